"""Blocking calls beside the event loop: never more than a given number at once, or many as one."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

from hscr.errors import HscrError, StoreError

T = TypeVar("T")
A = TypeVar("A")


class Threads:
    """`await threads(function, *args)` runs the function in one of `size` threads."""

    def __init__(self, size: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=size, thread_name_prefix=name)

    async def __call__(self, function: Callable[..., T], *args: Any, **named: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, partial(function, *args, **named))

    def close(self) -> None:
        """Wait for the calls that run; drop those that have not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Together(Generic[A, T]):
    """`await together(argument)` takes its turn with all who asked while the last turn was running.

    So a busy database is asked once for many (a group commit) and an idle one at once. A turn takes only who
    asked before it began: nobody is told what was true before they asked.
    """

    def __init__(
        self, many: Callable[[Sequence[A]], Awaitable[Sequence[T | HscrError]]], *, most: int = 64
    ) -> None:
        """`many` takes at most `most` arguments and returns a result, or an error to raise, for each."""
        self._many = many
        self._most = most
        self._waiting: deque[tuple[A, asyncio.Future[T]]] = deque()
        self._turns: asyncio.Task[None] | None = None

    async def __call__(self, argument: A) -> T:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((argument, future))
        if self._turns is None or self._turns.done():
            self._turns = asyncio.create_task(self._take_turns())
        return await future

    async def _take_turns(self) -> None:
        turn: list[tuple[A, asyncio.Future[T]]] = []
        try:
            while self._waiting:
                turn = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
                await self._take(turn)
        finally:  # when this task is cancelled nobody is left waiting
            for _, future in (*turn, *self._waiting):
                future.cancel()
            self._waiting.clear()

    async def _take(self, turn: Sequence[tuple[A, asyncio.Future[T]]]) -> None:
        outcomes: Sequence[T | Exception]
        try:
            outcomes = await self._many([argument for argument, _ in turn])
        except Exception as error:  # noqa: BLE001  whoever waits gets it
            if len(turn) == 1 or isinstance(error, StoreError):  # the store is away, for all of them
                outcomes = [error] * len(turn)
            else:  # what is wrong with one is not to fail the others
                for each in turn:
                    await self._take([each])
                return
        for (_, future), outcome in zip(turn, outcomes, strict=True):
            if future.done():  # its request was cancelled
                continue
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
