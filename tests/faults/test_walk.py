"""Whoever dies wherever: the loop completes, nothing is lost, nothing is there twice."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import zip_longest

import pytest

from hscr.errors import DatabaseUnavailable
from tests.faults.points import documented, points
from tests.faults.stand import Death, Stand
from tests.faults.turn import Turn

ALL = points()
ONLY_AFTER = {"attempt.handing-back": "child.told", "attempt.handed-back": "child.told"}
"""Points that a healthy loop does not pass, and the death that leads there."""
LEAVING = {"agent.retired", "agent.unloaded", "engine.unload"}
"""Points that a version of an earlier turn passes when it goes."""

pytestmark = pytest.mark.timeout(900)


def walk(stand: Stand, *chosen: str) -> list[Death]:
    """A turn in which whoever passes each of the points dies there, and what must be true afterwards."""
    if stand.turns == 0 and LEAVING & set(chosen):
        walk(stand)
    leading = [ONLY_AFTER[point] for point in chosen if point in ONLY_AFTER]
    with stand.dying(*dict.fromkeys([*chosen, *leading])) as deaths:
        turn = Turn(stand, stand.turns)
        stand.turns += 1
        turn.run()
        turn.check_rest()
    for death in deaths:
        assert death.process in documented()[base(death.point)], death
    return deaths


def base(point: str) -> str:
    """The point's name without the kind."""
    return ".".join(point.split(".")[:2])


def one_of_each_process() -> list[str]:
    """Which one turns with the number of points, so that none is left out for ever."""
    of = {name: processes for name, processes in documented().items() if len(processes) == 1}
    processes = sorted({processes[0] for processes in of.values()})
    mine = {
        process: [p for p in ALL if of.get(base(p)) == (process,) and p not in ONLY_AFTER]
        for process in processes
    }
    return [choices[len(ALL) % len(choices)] for choices in mine.values()]


def rounds() -> list[list[str]]:
    """All points in few turns, at most one of each lane in a turn: a job that dies three times is parked."""
    lanes: dict[str, list[str]] = {}
    for place, point in enumerate(ALL):
        first, *_, last = point.split(".")
        kinded = first == "attempt" and point.count(".") == 2
        name = {
            "attempt": "generate",
            "checkpoint": "finetune",
            "folder": "finetune",
            "score-answer": "score_answer",
        }.get(first, first)
        alone = {"gateway": f"gateway-{place % 2}"}.get(documented()[base(point)][0], name)
        lanes.setdefault(last if kinded else alone, []).append(point)
    return [[p for p in each if p] for each in zip_longest(*lanes.values())]


def test_every_process_dies_in_one_turn(stand: Stand) -> None:
    deaths = walk(stand, *one_of_each_process())
    assert len({death.process for death in deaths}) == len(deaths) == 8


def test_redis_comes_back_empty_wherever_it_is_needed(stand: Stand) -> None:
    """A message lost, a job that runs meanwhile, and a release under way."""
    with ExitStack() as stack:
        for point in ("relay.due", "attempt.claimed.finetune", "release.proposed"):
            stack.enter_context(stand.at(point, stand.empty_redis))
        walk(stand)


def test_the_database_is_locked_for_longer_than_anybody_waits(stand: Stand) -> None:
    """By a writer that stands still in its transaction: the others go on when it does."""
    if stand.store.database.url.get_backend_name() == "postgresql":
        pytest.skip("a writer there keeps nobody from another row")

    def outlast() -> None:
        with pytest.raises(DatabaseUnavailable), stand.store.database.write():
            pass

    with stand.at("attempt.written.finetune", outlast):
        walk(stand)


@pytest.fixture(scope="session")
def walked() -> Iterator[list[tuple[Death, float]]]:
    """Who died where, shown when all is over."""
    deaths: list[tuple[Death, float]] = []
    yield deaths
    lines = [f"{death.point:36} {death.process:16} {seconds:6.1f} s" for death, seconds in deaths]
    print(f"\n{len(deaths)} of {len(ALL)} points walked", *lines, sep="\n")  # noqa: T201


@pytest.mark.faults
@pytest.mark.parametrize("chosen", rounds(), ids=lambda chosen: f"{len(chosen)} points")
def test_rounds(chosen: list[str], stand: Stand) -> None:
    """All points in a few turns: less than a quarter of the time, and less to tell from a failure."""
    walk(stand, *chosen)


@pytest.mark.faults
@pytest.mark.parametrize("point", ALL)
def test_alone(point: str, stand: Stand, walked: list[tuple[Death, float]]) -> None:
    started = time.monotonic()
    death, *_ = walk(stand, point)
    walked.append((death, time.monotonic() - started))
