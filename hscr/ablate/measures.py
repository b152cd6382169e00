"""From answers to numbers with intervals: scores of arms, differences, and what becomes of a claim."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hscr.ablate.paper import Claim
from hscr.ablate.results import ArmRun
from hscr.config import GateConfig
from hscr.errors import InvalidInput
from hscr.evaluate.gate import interval
from hscr.evaluate.outcome import Outcome
from hscr.records import Interval

CLOSED_KINDS = frozenset({"abnormal", "presence"})
"""Questions that are answered with yes or no."""
CAPTION = "caption"


@dataclass(frozen=True)
class Value:
    """One number about one item. Items of a cluster are not independent."""

    value: float
    cluster: str
    cell: tuple[str, str] = ("", "")
    """question kind and truth class, over which scores are macro-averaged"""


Values = dict[str, Value]
"""By item: a question of the suite, or a question of the training data."""


@dataclass(frozen=True)
class Metric:
    name: str
    label: str
    short: str
    values: Callable[[ArmRun, Sequence[Outcome]], Values]
    """from an arm's run and its scored answers"""


def _scored(keep: Callable[[Outcome], bool]) -> Callable[[ArmRun, Sequence[Outcome]], Values]:
    return lambda _run, outcomes: {
        o.item_id: Value(o.score, o.cluster, (o.kind, o.truth_class)) for o in outcomes if keep(o)
    }


def _wrong_captions(field: str) -> Callable[[ArmRun, Sequence[Outcome]], Values]:
    return lambda _run, outcomes: {
        o.item_id: Value(float(getattr(o, field)), o.cluster) for o in outcomes if o.kind == CAPTION
    }


def _dependence(run: ArmRun, outcomes: Sequence[Outcome]) -> Values:
    cluster = {outcome.item_id: outcome.cluster for outcome in outcomes}
    return {item: Value(value, cluster[item]) for item, value in run.dependence.items()}


def _probability(run: ArmRun, _outcomes: Sequence[Outcome]) -> Values:
    # The id of a phantom's question is split, image and kind.
    return {source: Value(value, source.rsplit("-", 1)[0]) for source, value in run.probability.items()}


_METRICS = (
    Metric("open", "open", "open", _scored(lambda o: o.kind not in CLOSED_KINDS | {CAPTION})),
    Metric("closed", "closed", "closed", _scored(lambda o: o.kind in CLOSED_KINDS)),
    Metric("macro_score", "macro score", "macro", _scored(lambda _: True)),
    Metric("hallucination_rate", "captions hallucinating", "halluc.", _wrong_captions("hallucinated")),
    Metric("omission_rate", "captions omitting", "omits", _wrong_captions("omitted")),
    Metric("visual_dependence", "visual dependence (nats)", "visual", _dependence),
    Metric("probability", "probability of dispreferred", "p(neg)", _probability),
)
METRICS = {metric.name: metric for metric in _METRICS}

Arms = Mapping[str, Sequence[Values]]
"""By arm, its values under each seed."""


def level(seeds: Sequence[Values], config: GateConfig) -> Interval | None:
    """Mean over seeds with its interval; None where there is nothing of the kind."""
    return _interval(seeds, config) if all(seeds) else None


def difference(first: Sequence[Values], second: Sequence[Values], config: GateConfig) -> Interval | None:
    """first - second, paired by seed and item, over the items that both have."""
    pairs = list(zip(first, second, strict=True))
    gaps = [{k: _less(a[k], b[k]) for k in a if k in b} for a, b in pairs]
    return _interval(gaps, config) if all(gaps) else None


def _less(a: Value, b: Value) -> Value:
    return Value(a.value - b.value, a.cluster, a.cell)


def _interval(seeds: Sequence[Values], config: GateConfig) -> Interval:
    """Images and seeds are both resampled: see `hscr.evaluate.gate.interval`."""
    values = [(value, seed) for seed, each in enumerate(seeds) for value in each.values()]
    return interval(
        [value.value for value, _ in values],
        [value.cluster for value, _ in values],
        config,
        cells=[value.cell for value, _ in values],
        runs=[seed for _, seed in values],
    )


class Finding(StrEnum):
    AGREES = "agrees"
    DISAGREES = "disagrees"
    NOT_DISTINGUISHABLE = "not distinguishable at these seeds"


@dataclass(frozen=True)
class Ordering:
    """A claim of the paper and what was measured: `difference` is better - worse."""

    claim: Claim
    finding: Finding
    difference: Interval


def ordering(claim: Claim, arms: Arms, config: GateConfig) -> Ordering:
    """Agrees or disagrees only where the interval leaves 0 out."""
    gap = difference(arms[claim.better], arms[claim.worse], config)
    if gap is None:
        raise InvalidInput(
            f"{claim.better} and {claim.worse} have no {claim.metric} in common.",
            remedy="Raise --records, so that both arms make records of the same questions.",
        )
    return Ordering(claim, _finding(gap), gap)


def _finding(gap: Interval) -> Finding:
    if gap.low > 0:
        return Finding.AGREES
    return Finding.DISAGREES if gap.high < 0 else Finding.NOT_DISTINGUISHABLE
