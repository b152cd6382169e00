"""Gateways that route by the product's own rule to simulated engines, asked at random moments."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from unittest.mock import patch

from benchmarks.quantile import quantile
from benchmarks.simulating.engine import ANSWER_TOKENS, Clock, Engine, Gpu
from hscr.errors import Overloaded
from hscr.records import Replica
from service.engines import ATTEMPTS
from service.limits import Admission
from service.metrics import Metrics
from service.replicas import Replicas
from service.settings import GatewaySettings

SPREAD = 32
"""An answer has 64 tokens, more or fewer by up to so many."""
_REPORT_SECONDS = 0.5


@dataclass
class Outcome:
    """Of the questions asked, or broken off, from `since` until `until`, in simulated seconds."""

    since: float = 0.0
    until: float = float("inf")
    seconds: list[float] = field(default_factory=list)
    """from being asked to the last token, of those answered"""
    rejected: int = 0
    broken: int = 0

    def counts(self, asked_at: float) -> bool:
        return self.since <= asked_at < self.until

    def quantile(self, share: float) -> float:
        """Infinite when nothing was answered."""
        return quantile(self.seconds, share) if self.seconds else float("inf")

    @property
    def p99(self) -> float:
        return self.quantile(0.99)

    @property
    def rejected_share(self) -> float:
        return self.rejected / max(1, self.rejected + self.broken + len(self.seconds))


class Gateway:
    """One copy. It knows what it asked itself, and nothing of the other copies."""

    def __init__(self, cluster: "Cluster", settings: GatewaySettings) -> None:
        self._cluster = cluster
        self.view = Replicas(settings, Metrics())
        self._admission = Admission(settings.max_in_flight, lambda: 1)

    def ask(self, outcome: Outcome, tokens: int) -> None:
        """Take a place and a replica, or refuse; `outcome` hears what becomes of the question."""
        clock = self._cluster.clock
        asked_at, counts = clock.now, outcome.counts(clock.now)
        with ExitStack() as stack:
            try:
                stack.enter_context(self._admission.slot())
                replica = self._chosen()
            except Overloaded:
                outcome.rejected += counts
                return
            if replica is None:
                outcome.broken += counts
                return
            stack.enter_context(self.view.asked(replica))
            held = stack.pop_all()

        def done(completed: bool) -> None:
            held.close()
            (self.view.succeeded if completed else self.view.failed)(replica)
            if counts and completed:
                outcome.seconds.append(clock.now - asked_at)
            outcome.broken += not completed and outcome.counts(clock.now)

        self._cluster.engines[replica.id].ask(tokens, done)

    def _chosen(self) -> Replica | None:
        """As service/engines.py does: the first of those serving, 429 when it is full, one more attempt.

        None when every attempt met a dead engine. Raises Overloaded.
        """
        tried: set[str] = set()
        while len(tried) < ATTEMPTS:
            replica = next(iter(self.view.serving(None, without=tried)), None)
            if replica is None or self.view.full(replica):
                raise Overloaded("No replica is free.", remedy="Ask again.")
            if self._cluster.engines[replica.id].alive:
                return replica
            with self.view.asked(replica):
                self.view.failed(replica)
            tried.add(replica.id)
        return None


class Cluster:
    """`gateways` copies before `replicas` engines; a load balancer deals questions to the copies at random.

    With `own_order` each copy lists the replicas in an order of its own: the rule takes the first of equals.
    """

    def __init__(
        self,
        gpu: Gpu,
        *,
        replicas: int,
        gateways: int,
        seed: int,
        settings: GatewaySettings | None = None,
        slots: int = 256,
        own_order: bool = False,
    ) -> None:
        self.clock = Clock()
        self.engines: dict[str, Engine] = {}
        self._reported: dict[str, Replica] = {}
        self._gpu = gpu
        self._slots = slots
        self._own_order = own_order
        self._random = random.Random(seed)  # noqa: S311 - repeatable, no secret
        self._settings = settings or GatewaySettings()
        self.gateways = [Gateway(self, self._settings) for _ in range(gateways)]
        for number in range(replicas):
            self.add(f"replica-{number}")

    def add(self, name: str) -> None:
        """A new engine, whose agent reports it ready."""
        self.engines[name] = Engine(self.clock, self._gpu, slots=self._slots)
        self._reported[name] = Replica(
            id=name, address=name, model="base", model_digest="", engine="simulated", numeric_mode="",
            template_digest="", loaded=(), ready=True, seen_at=_moment(0),
        )  # fmt: skip

    def lose(self, name: str) -> None:
        """A machine that fails: its agent reports nothing any more."""
        self.engines[name].die()

    def withdraw(self, name: str) -> None:
        """As an agent does before its engine ends: what is under way is answered."""
        self._reported[name] = self._reported[name].model_copy(update={"ready": False})

    def run(self, rate: float, *, until: float, outcome: Outcome) -> Outcome:
        """Questions at `rate` a second, exponentially spaced, until all those asked by then are answered."""

        def ask() -> None:
            tokens = self._random.randint(ANSWER_TOKENS - SPREAD, ANSWER_TOKENS + SPREAD)
            self._random.choice(self.gateways).ask(outcome, tokens)
            again(self.clock.now + self._random.expovariate(rate), ask)

        def again(when: float, what: Callable[[], None]) -> None:
            if when < until:
                self.clock.at(when, what)

        def polling(gateway: Gateway) -> Callable[[], None]:
            def poll() -> None:
                gateway.view.refresh(self._seen(), ())
                again(self.clock.now + self._settings.pointer_poll, poll)

            return poll

        with self._clocks():
            for gateway in self.gateways:
                gateway.view.refresh(self._seen(), ())
                again(self._random.uniform(0, self._settings.pointer_poll), polling(gateway))
            again(self._random.expovariate(rate), ask)
            self.clock.run()
        return outcome

    def _seen(self) -> list[Replica]:
        """What the database holds: the last report of each agent that lives or died a moment ago."""
        now = self.clock.now
        for name, report in self._reported.items():
            age = now - (report.seen_at - _moment(0)).total_seconds()
            if self.engines[name].alive and age >= _REPORT_SECONDS:
                self._reported[name] = report.model_copy(update={"seen_at": _moment(now)})
        oldest = _moment(now - self._settings.replicas_seen)
        seen = [report for report in self._reported.values() if report.seen_at >= oldest]
        return self._random.sample(seen, len(seen)) if self._own_order else seen

    @contextmanager
    def _clocks(self) -> Iterator[None]:
        """The rule's own clocks show simulated time."""
        with ExitStack() as patched:
            for module in ("replicas", "circuit"):
                patched.enter_context(patch(f"service.{module}.monotonic", lambda: self.clock.now))
            yield


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(seconds=seconds)
