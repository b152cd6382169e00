"""An engine that answers many questions at once, by the arithmetic of docs/sizing.md."""

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

PARAMETERS = 7.06e9
PROMPT_TOKENS = 750
ANSWER_TOKENS = 64
_PRODUCTS_SHARE = 0.4
_BANDWIDTH_SHARE = 0.6


class Gpu(NamedTuple):
    """From a data sheet."""

    flops: float
    """dense, bf16, per second"""
    bytes_per_s: float

    @property
    def prompt_s(self) -> float:
        """Reading one prompt, while the answers under way wait."""
        return 2 * PARAMETERS * PROMPT_TOKENS / (_PRODUCTS_SHARE * self.flops)

    @property
    def step_s(self) -> float:
        """One token more for every answer under way: all weights are read once."""
        return 2 * PARAMETERS / (_BANDWIDTH_SHARE * self.bytes_per_s)

    def rate(self, at_once: int = 32) -> float:
        """Answers per second with always so many under way."""
        return 1 / (self.prompt_s + ANSWER_TOKENS * self.step_s / at_once)


GPUS = {"H100": Gpu(989e12, 3.35e12), "H200": Gpu(989e12, 4.8e12)}


class Clock:
    """Simulated seconds, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (when, next(self._order), what))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._agenda:
            self.now, _, happen = heapq.heappop(self._agenda)
            happen()


class Engine:
    """Continuous batching: newcomers join between two steps, each step gives all answers one token."""

    def __init__(self, clock: Clock, gpu: Gpu, *, slots: int = 256) -> None:
        self.alive = True
        self._clock = clock
        self._gpu = gpu
        self._slots = slots
        self._steps = 0
        self._stepping = False
        self._order = count()
        self._waiting: deque[tuple[int, Callable[[bool], None]]] = deque()
        self._running: list[tuple[int, int, Callable[[bool], None]]] = []

    def ask(self, tokens: int, done: Callable[[bool], None]) -> None:
        """`done` hears whether the answer of so many tokens was completed."""
        self._waiting.append((tokens, done))
        if not self._stepping:
            self._step()

    def die(self) -> None:
        """What is under way is lost."""
        self.alive = False
        lost = [done for _, done in self._waiting] + [done for *_, done in self._running]
        self._waiting.clear()
        self._running.clear()
        for done in lost:
            done(False)

    def _step(self) -> None:
        joining = min(len(self._waiting), self._slots - len(self._running))
        for _ in range(joining):
            tokens, done = self._waiting.popleft()
            heapq.heappush(self._running, (self._steps + tokens, next(self._order), done))
        self._stepping = bool(self._running)
        if self._stepping:
            self._clock.at(self._clock.now + joining * self._gpu.prompt_s + self._gpu.step_s, self._stepped)

    def _stepped(self) -> None:
        self._steps += 1
        while self._running and self._running[0][0] == self._steps:
            heapq.heappop(self._running)[2](True)
        self._step()
