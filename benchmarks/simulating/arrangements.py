"""What is simulated: steady traffic, the loss of a replica, a rollout; and with how many gateways."""

from typing import NamedTuple

from benchmarks.simulating.cluster import Cluster, Outcome
from benchmarks.simulating.engine import Gpu
from service.settings import GatewaySettings

QUESTIONS = 8_000
PLANNED = 0.6
"""the utilisation that docs/sizing.md plans with"""
LOSS_SECONDS = 30.0
ROLLOUT_SECONDS = 60.0
_SETTLING = 20.0
_NO_BOUND = 10**9


class Arrangement(NamedTuple):
    """`own_order`: see Cluster. `all_knowing`: one gateway without bounds, hence with the true counts."""

    name: str
    own_order: bool = False
    all_knowing: bool = False

    def cluster(self, gpu: Gpu, replicas: int, seed: int) -> Cluster:
        """A copy admits 64 questions, and two replicas are full with so many: half as many copies."""
        settings = GatewaySettings()
        gateways = max(2, replicas * settings.max_outstanding_per_replica // settings.max_in_flight)
        if self.all_knowing:
            settings = GatewaySettings(max_in_flight=_NO_BOUND, max_outstanding_per_replica=_NO_BOUND)
            gateways = 1
        return Cluster(
            gpu, replicas=replicas, gateways=gateways, seed=seed, settings=settings, own_order=self.own_order
        )


AS_IT_IS = Arrangement("the rule as it is")
OWN_ORDER = Arrangement("each copy with its own order of equals", own_order=True)
LIMIT = Arrangement("all-knowing", all_knowing=True)
ARRANGEMENTS = (AS_IT_IS, OWN_ORDER, LIMIT)


def steady(
    gpu: Gpu, by: Arrangement, replicas: int, utilisation: float, *, questions: int = QUESTIONS, seed: int = 0
) -> Outcome:
    """Of the last four fifths of so many questions."""
    rate = utilisation * replicas * gpu.rate()
    until = questions / rate
    return by.cluster(gpu, replicas, seed).run(rate, until=until, outcome=Outcome(since=until / 5))


def loss(gpu: Gpu, replicas: int, seed: int) -> Outcome:
    """One replica dies; the questions of the half minute from then on."""
    cluster = AS_IT_IS.cluster(gpu, replicas, seed)
    cluster.clock.at(_SETTLING, lambda: cluster.lose("replica-0"))
    until = _SETTLING + LOSS_SECONDS
    outcome = Outcome(since=_SETTLING, until=until)
    return cluster.run(PLANNED * replicas * gpu.rate(), until=until, outcome=outcome)


def rollout(gpu: Gpu, replicas: int, seed: int) -> Outcome:
    """Within a minute each replica is withdrawn once its successor is ready; the questions of that minute."""
    cluster = AS_IT_IS.cluster(gpu, replicas, seed)
    for number in range(replicas):

        def replace(number: int = number) -> None:
            cluster.add(f"successor-{number}")
            cluster.withdraw(f"replica-{number}")

        cluster.clock.at(_SETTLING + ROLLOUT_SECONDS * number / replicas, replace)
    until = _SETTLING + ROLLOUT_SECONDS
    outcome = Outcome(since=_SETTLING, until=until)
    return cluster.run(PLANNED * replicas * gpu.rate(), until=until, outcome=outcome)
