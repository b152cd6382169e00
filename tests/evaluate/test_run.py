"""Asking a suite: everything answered, in order, within the bound; cancelling and errors end it at once."""

import asyncio

import pytest

from hscr.errors import EngineUnavailable, InvalidInput, JobCancelled
from hscr.evaluate.run import run
from hscr.evaluate.suites import Suite, SuiteItem


class Answerer:
    """Answers with the truth after a few turns of the event loop, the later the sooner."""

    def __init__(self, suite: Suite) -> None:
        self.patience = {item.id: len(suite.items) - at for at, item in enumerate(suite.items)}
        self.running = self.most = self.started = self.finished = 0

    async def __call__(self, item: SuiteItem) -> str:
        self.started += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(self.patience[item.id] % 7):
                await asyncio.sleep(0)
            self.finished += 1
        finally:
            self.running -= 1
        return item.truth


def test_every_item_is_answered_in_order_within_the_bound(phantoms: Suite) -> None:
    answer, seen = Answerer(phantoms), []
    outcomes = asyncio.run(
        run(phantoms, answer, concurrency=5, on_progress=lambda done, total: seen.append((done, total)))
    )
    assert [outcome.item_id for outcome in outcomes] == [item.id for item in phantoms.items]
    assert all(outcome.score == 1 for outcome in outcomes)
    assert answer.most == 5
    assert seen == [(done, len(phantoms.items)) for done in range(1, len(phantoms.items) + 1)]


def test_cancelling_leaves_nothing_in_flight(phantoms: Suite) -> None:
    answer = Answerer(phantoms)

    async def cancelled() -> int:
        with pytest.raises(JobCancelled):
            await run(phantoms, answer, concurrency=4, should_stop=lambda: answer.finished >= 10)
        return answer.running

    assert asyncio.run(cancelled()) == 0
    assert answer.started < 20


def test_the_first_error_ends_the_run(phantoms: Suite) -> None:
    answer = Answerer(phantoms)

    async def failing(item: SuiteItem) -> str:
        if item.id == phantoms.items[8].id:
            raise EngineUnavailable("No replica answered.", remedy="Start an engine.")
        return await answer(item)

    with pytest.raises(EngineUnavailable, match="Start an engine"):
        asyncio.run(run(phantoms, failing, concurrency=3))
    assert answer.running == 0
    assert answer.started < 20


def test_suites_that_cannot_be_asked(phantoms: Suite) -> None:
    answer = Answerer(phantoms)
    with pytest.raises(InvalidInput, match="no questions"):
        asyncio.run(run(Suite("empty", ()), answer, concurrency=1))
    with pytest.raises(InvalidInput, match=f"the id {phantoms.items[0].id} twice"):
        asyncio.run(run(Suite("twice", phantoms.items[:1] * 2), answer, concurrency=1))
