"""What every request of a busy gateway passes: who asks, and the keeping of the job it asks for.

Both are asked for many at once (`Together`): by threads, as everything else, or on PostgreSQL by the event
loop itself, which takes a third of the processor time and waits for no other thread.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Protocol

from hscr.errors import IdempotencyConflict
from hscr.records import ApiKey, Job
from hscr.store.jobs import Asked
from hscr.store.keys import FIND_LIVE, hashes_of, in_order
from hscr.store.line import Line
from hscr.store.store import Store
from hscr.store.submitting import SUBMIT, told
from service.threads import Threads


class Entrance(Protocol):
    """`Keys.verify_all` and `Jobs.submit_all`, awaited. Each is called again only after it has returned."""

    async def verify_all(self, secrets: Sequence[str]) -> Sequence[ApiKey | None]: ...

    async def submit_all(self, asked: Sequence[Asked]) -> Sequence[Job | IdempotencyConflict]: ...

    async def close(self) -> None: ...


class ByThreads:
    """On any database."""

    def __init__(self, store: Store, threads: Threads) -> None:
        self._store = store
        self._threads = threads

    async def verify_all(self, secrets: Sequence[str]) -> Sequence[ApiKey | None]:
        return await self._threads(self._store.keys.verify_all, secrets)

    async def submit_all(self, asked: Sequence[Asked]) -> Sequence[Job | IdempotencyConflict]:
        return await self._threads(self._store.jobs.submit_all, asked)

    async def close(self) -> None:
        pass


class ByLines:
    """On PostgreSQL, by a connection for each question."""

    def __init__(self, store: Store, threads: Threads) -> None:
        self._rarely = ByThreads(store, threads)
        self._keys, self._jobs = Line(store.database), Line(store.database)

    async def verify_all(self, secrets: Sequence[str]) -> Sequence[ApiKey | None]:
        hashes = hashes_of(secrets)
        return in_order(hashes, await self._keys(FIND_LIVE, hashes=sorted(set(hashes))))

    async def submit_all(self, asked: Sequence[Asked]) -> Sequence[Job | IdempotencyConflict]:
        made = {row["id"] for row in await self._jobs(SUBMIT, asked=told(asked))}
        repeated = [each for each in asked if each.job.id not in made]
        if not repeated:
            return [each.job for each in asked]
        earlier = iter(await self._rarely.submit_all(repeated))
        return [each.job if each.job.id in made else next(earlier) for each in asked]

    async def close(self) -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._keys.close)
            stack.push_async_callback(self._jobs.close)


def entrance(store: Store, threads: Threads) -> Entrance:
    return ByLines(store, threads) if store.database.speaks_postgresql else ByThreads(store, threads)
