"""Waiting for what other processes do: never for a fixed time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(look: Callable[[], T], *, seconds: float = 30.0, what: str = "the condition") -> T:
    """Look again and again until the result is truthy, and return it. Fails after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < until, f"{what} did not come true within {seconds:g} s; last seen: {seen!r}"
        time.sleep(0.02)
