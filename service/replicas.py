"""The replicas as this copy sees them: what each has loaded, how busy it is, whether it can be trusted."""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import count
from time import monotonic

from hscr.records import Replica
from service.circuit import Circuit
from service.metrics import Metrics
from service.settings import GatewaySettings


class Replicas:
    """The view is as old as the last refresh, so a replica may be gone meanwhile.

    One that failed several times in a row, or whose agent fell silent, is asked only when no other is left.
    """

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._replicas: dict[str, Replica] = {}
        self._heard_at: dict[str, float] = {}
        self._circuits: dict[str, Circuit] = {}
        self._outstanding: Counter[str] = Counter()
        self._turns: Counter[str] = Counter()
        self._turn = count(1)

    @property
    def all(self) -> list[Replica]:
        return list(self._replicas.values())

    def refresh(self, replicas: list[Replica], desired: Collection[str]) -> None:
        """Replace the view. What a replica has beside the `desired` versions, or lacks of them, is drift."""
        self._heard_at = {replica.id: self._last_heard(replica) for replica in replicas}
        self._replicas = {replica.id: replica for replica in replicas}
        self._circuits = {
            replica.address: self._circuits.get(replica.address) or self._circuit() for replica in replicas
        }
        self._measure(frozenset(desired))

    def serving(self, version: str | None, *, without: Collection[str] = ()) -> list[Replica]:
        """Ready replicas that have the version (None: the base model), the least outstanding first.

        Of equally busy ones, that which was asked least recently: every gateway counts its own requests
        alone, and many that choose alike would all ask the same. `without` are ids of replicas that were
        asked already.
        """
        ready = [each for each in self.all if each.ready and each.id not in without]
        loaded = [each for each in ready if version is None or version in each.loaded]
        admitting = [each for each in loaded if self._circuits[each.address].admits] or loaded
        heard = [each for each in admitting if not self._silent(each)] or admitting
        return sorted(heard, key=lambda each: (self._outstanding[each.address], self._turns[each.address]))

    def full(self, replica: Replica) -> bool:
        return self._outstanding[replica.address] >= self._settings.max_outstanding_per_replica

    def abandoned(self, address: str) -> bool:
        """Whether nobody reports this address any more and nothing is under way there."""
        return not self._outstanding[address] and all(each.address != address for each in self.all)

    @contextmanager
    def asked(self, replica: Replica) -> Iterator[None]:
        """Count one request from here to the end of the block."""
        self._outstanding[replica.address] += 1
        self._turns[replica.address] = next(self._turn)
        try:
            with self._circuits[replica.address].request():
                yield
        finally:
            self._outstanding[replica.address] -= 1

    def succeeded(self, replica: Replica) -> None:
        """A request ended well. The replica may have gone from the view meanwhile, here as in `failed`."""
        if circuit := self._circuits.get(replica.address):
            circuit.succeeded()

    def failed(self, replica: Replica) -> None:
        if circuit := self._circuits.get(replica.address):
            circuit.failed()

    def _last_heard(self, replica: Replica) -> float:
        """By this machine's clock: when a report was first seen here, not what it says of its age."""
        before = self._replicas.get(replica.id)
        if before is None or before.seen_at != replica.seen_at:
            return monotonic()
        return self._heard_at[replica.id]

    def _silent(self, replica: Replica) -> bool:
        return monotonic() - self._heard_at[replica.id] > self._settings.replicas_silent

    def _circuit(self) -> Circuit:
        return Circuit(
            threshold=self._settings.circuit_failures,
            pause=self._settings.circuit_pause,
            longest_pause=self._settings.circuit_longest_pause,
        )

    def _measure(self, desired: frozenset[str]) -> None:
        metrics = self._metrics
        metrics.replicas.set(sum(each.ready for each in self.all))
        metrics.drift.labels("missing").set(sum(not desired.issubset(each.loaded) for each in self.all))
        metrics.drift.labels("surplus").set(sum(not desired.issuperset(each.loaded) for each in self.all))
        metrics.circuits.clear()
        for replica in self.all:
            metrics.circuits.labels(replica.id).set(self._circuits[replica.address].state)
