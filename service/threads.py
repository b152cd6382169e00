"""Blocking calls beside the event loop, never more than a given number at once."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


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
