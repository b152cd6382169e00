"""Who is alive, judged by whether their row changes under this process's own eyes.

A stamp is of the wall clock of whoever wrote it, which may jump or differ from ours. That it *changes* is
beyond doubt, and how long it has not is told by the monotonic clock.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from threading import Lock
from time import monotonic
from typing import NamedTuple

from hscr.records import now


class _Sighting(NamedTuple):
    stamp: datetime
    since: float


class Sightings:
    """`trusting`: what is seen for the first time counts as alive, whatever its stamp says."""

    def __init__(self, *, trusting: bool = False) -> None:
        self._trusting = trusting
        self._seen: dict[str, _Sighting] = {}
        self._looked = -float("inf")
        self._lock = Lock()

    def alive(self, stamps: Mapping[str, datetime], within: timedelta) -> set[str]:
        """Of all rows there are, by id, those that changed less than `within` ago.

        Where nobody has looked for so long, or ever, the stamp itself decides: by its distance from now on
        either side, because one that lies ahead is as wrong as an old one.
        """
        with self._lock:
            moment, longest = monotonic(), within.total_seconds()
            watched = moment - self._looked < longest
            self._looked = moment
            before, self._seen = self._seen, {}
            for key, stamp in stamps.items():
                known = before.get(key)
                if known is None or known.stamp != stamp:
                    changed = self._trusting or (known is not None and watched)
                    recent = changed or abs(now() - stamp) < within
                    known = _Sighting(stamp, moment if recent else -float("inf"))
                self._seen[key] = known
            return {key for key, known in self._seen.items() if moment - known.since < longest}
