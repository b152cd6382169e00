"""Whether rows and files agree: files that no row names can go, rows whose files are gone are told."""

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from pydantic import Field

from hscr.errors import NotFound
from hscr.records import Record
from hscr.store.blobs import READY
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
    versions = store.releases.adapters(limit=None)
    known = {version.digest for version in versions}
    unheld, missing = [], []
    for prefix in (f"{number:02x}" for number in range(256)):
        held = store.images.held(prefix)
        there = {path.name: path for path in _entries(store.blobs.root / "sha256" / prefix)}
        unheld += [name for name in sorted(there.keys() - held) if _old(there[name], older_than)]
        missing += sorted(held - there.keys())
    folders = [folder for folder in _entries(store.blobs.root / "folders") if folder.name not in known]
    return Findings(
        unheld_images=tuple(unheld),
        unknown_folders=tuple(each.name for each in folders if _old(_youngest(each), older_than)),
        lost_images=tuple(store.images.lost(missing)),
        lost_adapters=tuple(version.name for version in versions if not _whole(store, version.digest)),
    )


def repair(store: Store, findings: Findings) -> None:
    """Throw away the files that no row names, unless one does by now."""
    store.images.drop_unheld(findings.unheld_images)
    for digest in findings.unknown_folders:
        store.releases.drop_unknown(digest, store.blobs)


def keep_findings(store: Store, findings: Findings) -> None:
    """Where every process can read what the last check found: its sizes are metrics."""
    store.blobs.publish(_LAST, findings.model_dump_json().encode())


def last_findings(root: Path) -> Findings:
    """Of the blobs under `root`; of a store that was never checked there are none."""
    try:
        return Findings.model_validate(json.loads((root / _LAST).read_text()))
    except FileNotFoundError:
        return Findings()


def _whole(store: Store, digest: str) -> bool:
    try:
        store.blobs.folder(digest)
    except NotFound:
        return False
    return True


def _old(path: Path, older_than: timedelta) -> bool:
    try:
        return path.stat().st_mtime < time.time() - older_than.total_seconds()
    except FileNotFoundError:
        return False


def _youngest(folder: Path) -> Path:
    ready = folder / READY
    return ready if ready.exists() else folder


def _entries(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())
