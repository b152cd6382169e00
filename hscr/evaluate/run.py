"""Asking a whole suite: a bounded number of questions in flight, all answered or none counted."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

from hscr.errors import InvalidInput, InvalidQuestion, InvalidRecord, JobCancelled
from hscr.evaluate.metrics import score
from hscr.evaluate.outcome import Outcome
from hscr.evaluate.suites import Suite, SuiteItem
from hscr.models.chat import Chat

Answer = Callable[[SuiteItem], Awaitable[str]]
"""Answers one item with text; whatever it raises ends the run."""


async def run(
    suite: Suite,
    answer: Answer,
    *,
    concurrency: int,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Outcome]:
    """Outcomes in the suite's order, whatever order the answers came in.

    Args:
        suite: what to ask.
        answer: called at most `concurrency` times at once.
        concurrency: questions in flight, at least 1.
        on_progress: called with (answered, total) after each answer.
        should_stop: asked before each question; true ends the run.

    Raises:
        JobCancelled: `should_stop` said so; no question is left in flight.
        InvalidInput: the suite asks nothing, or twice under one id.
        Exception: the first one that `answer` raised; the others in flight are cancelled.
    """
    require_askable(suite)
    waiting = iter(enumerate(suite.items))
    outcomes: dict[int, Outcome] = {}

    async def ask() -> None:
        for position, item in _until(should_stop, waiting):
            outcomes[position] = score(item, await answer(item))
            on_progress(len(outcomes), len(suite.items))

    await _all_or_first_error([ask for _ in range(min(concurrency, len(suite.items)))])
    return [outcomes[position] for position in range(len(suite.items))]


def require_askable(suite: Suite) -> None:
    """Raises InvalidInput when the suite asks nothing, or twice under one id."""
    if not suite.items:
        raise InvalidInput(f"The suite {suite.name} has no questions.", remedy="Give its file some rows.")
    ((item_id, count),) = Counter(item.id for item in suite.items).most_common(1)
    if count > 1:
        raise InvalidInput(
            f"The suite {suite.name} has the id {item_id} twice.", remedy="Give every question its own id."
        )


def require_readable(suite: Suite, chat: Chat) -> None:
    """Raises InvalidQuestion, InvalidRecord; they name what the model cannot read as a question or answer."""
    for item in suite.items:
        try:
            chat.prompt_ids(item.question)
            chat.completion_ids(item.truth)
        except (InvalidQuestion, InvalidRecord) as error:
            raise type(error)(
                f"Question {item.id} of the suite {suite.name}: {error.detail}", remedy=error.remedy
            ) from error


def _until(
    should_stop: Callable[[], bool], items: Iterator[tuple[int, SuiteItem]]
) -> Iterator[tuple[int, SuiteItem]]:
    for item in items:
        if should_stop():
            raise JobCancelled(
                "The evaluation was cancelled.", remedy="Submit it again to judge the version."
            )
        yield item


async def _all_or_first_error(makers: list[Callable[[], Awaitable[None]]]) -> None:
    tasks = [asyncio.ensure_future(make()) for make in makers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
