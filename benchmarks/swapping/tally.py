"""What a run's requests and changes of the pointer add up to.

The promises: no request fails; no answer mixes versions, or is of one that served before or after but not
while it was asked; a change reaches every gateway in time.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.swapping.traffic import Asked
from hscr.errors import EngineInterrupted

SETTLED = 1.0
"""seconds after which a rollback must have reached every gateway; what a version may outlive its change by"""


@dataclass(frozen=True)
class Change:
    """The pointer moved to `version`: `called` when it was asked for, `flipped` when the row changed."""

    kind: str
    version: str
    called: float
    flipped: float
    reached: float
    """the start of the last request that another version answered, before the next change"""


@dataclass(frozen=True)
class Tally:
    requests: int
    failed: int
    interrupted: int
    mixed: int
    stale: int


def changes(calls: Sequence[tuple[str, str, float, float]], asked: Sequence[Asked]) -> list[Change]:
    """From (kind, version, called, flipped) in their order."""
    found = []
    for number, (kind, version, called, flipped) in enumerate(calls):
        until = calls[number + 1][2] if number + 1 < len(calls) else math.inf
        others = [
            one.start for one in asked if called <= one.start < until and one.version not in {version, None}
        ]
        found.append(Change(kind, version, called, flipped, max(others, default=called)))
    return found


def tally(
    asked: Sequence[Asked], moves: Sequence[Change], first: str, killed: Sequence[tuple[float, float]]
) -> Tally:
    """`first` served before all moves; `killed`: when a replica was away. A stream it broke is apart."""
    failures = [one for one in asked if one.text is None]
    broken = [one for one in failures if _broken(one, killed)]
    answers = [one for one in asked if one.text is not None]
    return Tally(
        requests=len(asked),
        failed=len(failures) - len(broken),
        interrupted=len(broken),
        mixed=sum(one.version is None for one in answers),
        stale=sum(
            one.version is not None and one.version not in _serving(one, moves, first) for one in answers
        ),
    )


def _broken(one: Asked, killed: Iterable[tuple[float, float]]) -> bool:
    """A stream that was open when its replica was killed, ended by an explicit error event."""
    open_then = any(one.start <= began and one.end >= began for began, _ in killed)
    return open_then and one.first is not None and one.failure == EngineInterrupted.slug


def _serving(one: Asked, moves: Sequence[Change], first: str) -> set[str]:
    """Versions that a request may have been given: of its start, and up to `SETTLED` before."""
    versions = {first}
    for move in moves:
        if move.flipped <= one.start - SETTLED:
            versions = {move.version}  # everything before has settled
        elif move.flipped <= (one.first or one.end):
            versions.add(move.version)
    return versions


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest rank: the smallest value that so large a share does not exceed; NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
