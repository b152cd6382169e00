"""What nobody needs any more on this machine's disk: copies of what a bucket holds, half-written things."""

import time
from datetime import timedelta
from pathlib import Path

from hscr.store.blobs import Blobs, remove, times_of
from hscr.store.store import Store


def drop_copies(store: Store, *, older_than: timedelta) -> list[str]:
    """Remove this machine's copies of adapters, and what a kill left half copied; returns their digests.

    What serves or may have to, and what a replica reported within that time, stays: an engine may read it.
    """
    drop_left_aside(store.blobs, older_than=older_than)
    before = time.time() - older_than.total_seconds()
    old = [digest for digest, copied in store.blobs.copies().items() if copied < before]
    if not old:
        return []
    loaded = {name for replica in store.releases.replicas(seen_within=older_than) for name in replica.loaded}
    needed = {version.digest for version in store.releases.desired()}
    needed |= {store.releases.adapter(name).digest for name in loaded}
    dropped = [digest for digest in old if digest not in needed]
    for digest in dropped:
        store.blobs.drop_copy(digest)
    return dropped


def drop_left_aside(blobs: Blobs, *, older_than: timedelta) -> list[Path]:
    """Remove what a killed process had begun to write and nobody goes on with; returns it."""
    before, folder = time.time() - older_than.total_seconds(), blobs.root / "aside"
    left = [folder / name for name, written in times_of(folder).items() if written < before]
    for entry in left:
        remove(entry)
    return left
