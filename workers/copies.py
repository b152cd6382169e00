"""Copies of adapters on this machine's disk, where a bucket holds them: what nothing loads any more goes."""

import time
from datetime import timedelta

from hscr.store.store import Store


def drop_copies(store: Store, *, older_than: timedelta) -> list[str]:
    """Remove this machine's; returns their digests.

    What serves or may have to, and what a replica reported within that time, stays: an engine may read it.
    """
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
