"""Whether rows and files agree: files that no row names can go, rows whose files are gone are told."""

import time
from datetime import timedelta

from pydantic import Field

from hscr.records import Record
from hscr.store.blobs import Blobs
from hscr.store.store import Store

_LAST = "last-check.json"


class Findings(Record):
    """Images by digest, adapters by name; a folder that no adapter has, by its digest."""

    unheld_images: tuple[str, ...] = Field(default=(), description="stored, and no study holds them")
    unknown_folders: tuple[str, ...] = Field(default=(), description="stored, and no adapter's")
    lost_images: tuple[str, ...] = Field(default=(), description="held by a study, and not stored")
    lost_adapters: tuple[str, ...] = Field(default=(), description="registered, and not stored whole")

    @property
    def lost(self) -> bool:
        """Whether something is missing, which only a backup can bring back."""
        return bool(self.lost_images or self.lost_adapters)


def check(store: Store, *, older_than: timedelta) -> Findings:
    """Compare all files with all rows. Files younger than `older_than` may be waiting for their row."""
    before = time.time() - older_than.total_seconds()
    versions = store.releases.adapters(limit=None)
    known = {version.digest for version in versions}
    unheld, missing = [], []
    for prefix in (f"{number:02x}" for number in range(256)):
        held = store.images.held(prefix)
        there = store.blobs.stored(prefix)
        unheld += sorted(digest for digest in there.keys() - held if there[digest] < before)
        missing += sorted(held - there.keys())
    folders = store.blobs.folders()
    unknown = sorted(digest for digest in folders.keys() - known if folders[digest] < before)
    return Findings(
        unheld_images=tuple(unheld),
        unknown_folders=tuple(unknown),
        lost_images=tuple(store.images.lost(missing)),
        lost_adapters=tuple(v.name for v in versions if not store.blobs.holds_folder(v.digest)),
    )


def repair(store: Store, findings: Findings) -> None:
    """Throw away the files that no row names, unless one does by now."""
    store.images.drop_unheld(findings.unheld_images)
    for digest in findings.unknown_folders:
        store.releases.drop_unknown(digest, store.blobs)


def keep_findings(store: Store, findings: Findings) -> None:
    """Where every process can read what the last check found: its sizes are metrics."""
    store.blobs.publish(_LAST, findings.model_dump_json().encode())


def last_findings(blobs: Blobs) -> Findings:
    """Of a store that was never checked there are none."""
    kept = blobs.published(_LAST)
    return Findings() if kept is None else Findings.model_validate_json(kept)
