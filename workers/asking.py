"""Asking a replica in the course of an attempt, which may have to end before the replica answers."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from hscr.errors import EngineInterrupted, EngineUnavailable
from hscr.records import Replica
from workers.leases import AttemptOver, Lease

T = TypeVar("T")

_WATCH_SECONDS = 0.5


def asked(replica: Replica, lease: Lease, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which asks the replica.

    Raises AttemptOver when the replica goes away: another attempt finds out who is live then.
    """
    try:
        return asyncio.run(_until_stopped(work, lease))
    except (EngineUnavailable, EngineInterrupted) as error:
        raise AttemptOver(f"replica {replica.id} went away ({error.slug})") from error


async def _until_stopped(work: Coroutine[Any, Any, T], lease: Lease) -> T:
    """The result of `work`, unless the attempt ends before: then also when the engine has gone silent."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_watch(lease))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[1].done():
            tasks[1].result()
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _watch(lease: Lease) -> None:
    while True:
        lease.check()
        await asyncio.sleep(_WATCH_SECONDS)
