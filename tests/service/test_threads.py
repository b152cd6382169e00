"""Store calls that are made together: in turns, none joining a turn that runs, none failing for another."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial

import pytest

from hscr.errors import Conflict, DatabaseUnavailable, HscrError, NotFound
from service.threads import Threads, Together


class Turns:
    """Squares numbers, one turn at a time, each of which waits to be let go."""

    def __init__(self) -> None:
        self.taken: list[list[int]] = []
        self.begun, self.going = threading.Semaphore(0), threading.Semaphore(0)
        self.trouble: Callable[[Sequence[int]], None] = lambda _: None

    def __call__(self, numbers: Sequence[int]) -> list[int | HscrError]:
        self.taken.append(list(numbers))
        self.begun.release()
        self.going.acquire()
        self.trouble(numbers)
        return [n * n if n >= 0 else NotFound(f"{n} is negative.") for n in numbers]

    def let_go(self, turns: int) -> None:
        self.going.release(turns)


@pytest.fixture
def turns() -> Iterator[Turns]:
    made = Turns()
    yield made
    made.let_go(1000)


def run(turns: Turns, test: Callable[[Together[int, int]], Awaitable[None]], **options: int) -> None:
    threads = Threads(4, "test")
    try:
        asyncio.run(test(Together(partial(threads, turns), **options)))
    finally:
        turns.let_go(1000)
        threads.close()


async def asking(together: Together[int, int], *numbers: int) -> list[asyncio.Task[int]]:
    """Asked, in this order, and not answered yet."""
    tasks = [asyncio.create_task(together(number)) for number in numbers]
    await asyncio.sleep(0)
    return tasks


def test_who_asks_while_a_turn_runs_is_in_the_next_one_together(turns: Turns) -> None:
    async def test(together: Together[int, int]) -> None:
        first = await asking(together, 1)
        await asyncio.to_thread(turns.begun.acquire)
        later = await asking(together, 2, 3, 4)
        turns.let_go(2)
        assert await asyncio.gather(*first, *later) == [1, 4, 9, 16]
        assert turns.taken == [[1], [2, 3, 4]]

    run(turns, test)


def test_a_turn_takes_no_more_than_it_may(turns: Turns) -> None:
    async def test(together: Together[int, int]) -> None:
        asked = await asking(together, *range(5))
        turns.let_go(3)
        assert await asyncio.gather(*asked) == [0, 1, 4, 9, 16]
        assert turns.taken == [[0, 1], [2, 3], [4]]

    run(turns, test, most=2)


def test_an_error_of_one_is_raised_for_that_one(turns: Turns) -> None:
    async def test(together: Together[int, int]) -> None:
        asked = await asking(together, 2, -1, 3)
        turns.let_go(1)
        two, refused, three = await asyncio.gather(*asked, return_exceptions=True)
        assert (two, three) == (4, 9)
        assert isinstance(refused, NotFound)

    run(turns, test)


@pytest.mark.parametrize("error", [ValueError("three"), Conflict("three")])
def test_an_argument_that_breaks_its_turn_fails_alone(turns: Turns, error: Exception) -> None:
    def no_threes(numbers: Sequence[int]) -> None:
        if 3 in numbers:
            raise error

    async def test(together: Together[int, int]) -> None:
        asked = await asking(together, 2, 3, 4)
        turns.let_go(4)
        two, three, four = await asyncio.gather(*asked, return_exceptions=True)
        assert (two, four) == (4, 16)
        assert three is error
        assert turns.taken == [[2, 3, 4], [2], [3], [4]]

    turns.trouble = no_threes
    run(turns, test)


def test_a_database_that_is_away_is_away_for_all_of_a_turn_and_asked_once(turns: Turns) -> None:
    def away(_: Sequence[int]) -> None:
        raise DatabaseUnavailable("The database did not answer.")

    async def test(together: Together[int, int]) -> None:
        asked = await asking(together, 2, 3)
        turns.let_go(1)
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [DatabaseUnavailable] * 2
        assert turns.taken == [[2, 3]]

        turns.trouble = lambda _: None
        turns.let_go(1)
        assert await together(5) == 25

    turns.trouble = away
    run(turns, test)


def test_who_leaves_takes_nobody_along(turns: Turns) -> None:
    async def test(together: Together[int, int]) -> None:
        leaving, staying = await asking(together, 2, 3)
        leaving.cancel()
        turns.let_go(1)
        assert await staying == 9
        with pytest.raises(asyncio.CancelledError):
            await leaving

    run(turns, test)


def test_nobody_waits_for_threads_that_are_closed(turns: Turns) -> None:
    async def test(together: Together[int, int]) -> None:
        first = await asking(together, 1)
        await asyncio.to_thread(turns.begun.acquire)
        second = await asking(together, 2)
        assert together._turns is not None
        together._turns.cancel()
        turns.let_go(1)
        outcomes = await asyncio.gather(*first, *second, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2

    run(turns, test)
