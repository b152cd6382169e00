"""A share of the traffic on the candidate: which requests go there, and what came of each version's."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from hscr.errors import EngineError
from hscr.records import Pointer, VersionCounts
from hscr.store.releases import BASE


def diverted(pointer: Pointer, sticky: str) -> bool:
    """Whether a request that names no version goes to the candidate.

    The same `sticky` key always goes the same way, in every copy; a larger share keeps those who were in, and
    another candidate draws others.
    """
    if pointer.candidate is None:
        return False
    digest = hashlib.sha256(f"{pointer.candidate}\0{sticky}".encode()).digest()
    return int.from_bytes(digest[:8]) < pointer.share * 2**64


class Tally:
    """Outcomes of the requests that chose their version in one epoch of the pointer, by version."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, VersionCounts] = defaultdict(VersionCounts)

    @property
    def counts(self) -> dict[str, VersionCounts]:
        return dict(self._counts)

    @contextmanager
    def asking(self, version: str | None) -> Iterator[None]:
        """Around an engine's call until its first text, or until a whole answer.

        What the client or the gateway's own limits ended says nothing about the version and is not counted.
        """
        began = monotonic()
        try:
            yield
        except EngineError:
            self._add(version, VersionCounts(requests=1, errors=1))
            raise
        self._add(version, VersionCounts(requests=1, texts=1, seconds=monotonic() - began))

    def broke_off(self, version: str | None) -> None:
        """A stream that had begun failed."""
        self._add(version, VersionCounts(errors=1))

    def _add(self, version: str | None, counts: VersionCounts) -> None:
        self._counts[version or BASE] += counts
