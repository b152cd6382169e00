"""A circuit breaker: a replica that fails again and again is left alone for a while, then tried once."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from time import monotonic


class CircuitState(IntEnum):
    """As the metric shows it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Circuit:
    """One replica's: `threshold` failures in a row open it for `pause` seconds, then one request tries.

    Its success closes the circuit; its failure opens it for twice as long, up to `longest_pause` seconds.
    """

    def __init__(self, *, threshold: int, pause: float, longest_pause: float) -> None:
        self._threshold = threshold
        self._first_pause = pause
        self._longest_pause = longest_pause
        self._trying = False
        self.succeeded()

    @property
    def state(self) -> CircuitState:
        if self._failures < self._threshold:
            return CircuitState.CLOSED
        return CircuitState.HALF_OPEN if monotonic() >= self._until else CircuitState.OPEN

    @property
    def admits(self) -> bool:
        """Whether a request may go this way now."""
        state = self.state
        return state is CircuitState.CLOSED or (state is CircuitState.HALF_OPEN and not self._trying)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around each request: the one that tries a half-open circuit keeps others out until it ends.

        What came of it is told by `succeeded` or `failed`; a client that left proves neither.
        """
        trial = self.state is CircuitState.HALF_OPEN and self.admits
        self._trying = self._trying or trial
        try:
            yield
        finally:
            if trial:
                self._trying = False

    def succeeded(self) -> None:
        self._failures = 0
        self._pause = self._first_pause
        self._until = 0.0

    def failed(self) -> None:
        self._failures += 1
        if self._failures >= self._threshold and monotonic() >= self._until:
            self._until = monotonic() + self._pause
            self._pause = min(2 * self._pause, self._longest_pause)
