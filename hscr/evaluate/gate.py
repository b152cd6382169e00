"""May the candidate serve? A paired comparison with the active version, by image, and three verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hscr.config import GateConfig
from hscr.errors import InvalidConfig, InvalidInput
from hscr.evaluate.metrics import ACCURACY, DEPENDENCE, HALLUCINATION, MACRO, OMISSION
from hscr.evaluate.outcome import Outcome
from hscr.records import GateVerdict, Interval

MIN_IMAGES = 20
"""With fewer clusters a percentile bootstrap covers too rarely to promote on."""

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


@dataclass(frozen=True)
class Measured:
    """One version on one suite. `dependence` is visual dependence in nats per item id, for the same texts."""

    outcomes: Sequence[Outcome]
    dependence: Mapping[str, float] = field(default_factory=dict)


class Judgement(NamedTuple):
    """`differences` are candidate - active: the scores in [-1, 1], visual dependence in nats."""

    verdict: GateVerdict
    reasons: tuple[str, ...]
    differences: dict[str, Interval]


def judge(candidate: Measured, active: Measured, config: GateConfig, *, seed: int = 0) -> Judgement:
    """Pass, fail or inconclusive.

    Pass: the target's interval lies above 0, and neither hallucination nor visual dependence is worse beyond
    its margin. Fail: an interval shows harm, that is the target's lies below 0, or a guarded metric is worse
    beyond its margin and its interval lies wholly on the worse side of 0. Otherwise, and always with fewer
    questions than `min_questions` or fewer images than `MIN_IMAGES`, inconclusive.

    Raises InvalidInput unless both versions answered the same items with finite values.
    """
    differences = compare(candidate, active, config, seed=seed)
    if config.target not in differences:
        raise InvalidConfig(
            f"The gate's target {config.target} was not measured.",
            remedy=f"Choose one of {', '.join(differences)}.",
        )
    return Judgement(*_verdict(differences, active.outcomes, config), differences)


def compare(
    candidate: Measured, active: Measured, config: GateConfig, *, seed: int = 0
) -> dict[str, Interval]:
    """Candidate - active for every metric both have, each with its paired, clustered bootstrap interval."""
    pairs = _pairs(candidate.outcomes, active.outcomes)
    cells = [(a.kind, a.truth_class) for _, a in pairs]
    clusters = [a.cluster for _, a in pairs]
    gains = [c.score - a.score for c, a in pairs]
    differences = {
        MACRO: interval(gains, clusters, config, cells=cells, seed=seed),
        ACCURACY: interval(gains, clusters, config, seed=seed),
    }
    captions = [(c, a) for c, a in pairs if a.hallucinated is not None]
    if captions:
        at = [a.cluster for _, a in captions]
        false = [float(bool(c.hallucinated)) - float(bool(a.hallucinated)) for c, a in captions]
        missed = [float(bool(c.omitted)) - float(bool(a.omitted)) for c, a in captions]
        differences[HALLUCINATION] = interval(false, at, config, seed=seed)
        differences[OMISSION] = interval(missed, at, config, seed=seed)
    return differences | _dependence(candidate, active, config, seed)


def _pairs(candidate: Sequence[Outcome], active: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    theirs = {outcome.item_id: outcome for outcome in candidate}
    ids = {outcome.item_id for outcome in active}
    if not ids or ids != theirs.keys() or len(ids) < len(active) or len(theirs) < len(candidate):
        raise InvalidInput(
            "The two versions were not asked the same questions, each once.", remedy="Run both on one suite."
        )
    return [(theirs[outcome.item_id], outcome) for outcome in active]


def _dependence(candidate: Measured, active: Measured, config: GateConfig, seed: int) -> dict[str, Interval]:
    if candidate.dependence.keys() != active.dependence.keys():
        raise InvalidInput(
            "Visual dependence was not measured on the same texts.", remedy="Score both versions on one list."
        )
    if not active.dependence:
        return {}
    cluster = {outcome.item_id: outcome.cluster for outcome in active.outcomes}
    if not active.dependence.keys() <= cluster.keys():
        raise InvalidInput(
            "Visual dependence was measured on items outside the suite.", remedy="Score items of the suite."
        )
    gains = [candidate.dependence[item] - active.dependence[item] for item in active.dependence]
    clusters = [cluster[item] for item in active.dependence]
    return {DEPENDENCE: interval(gains, clusters, config, seed=seed)}


def interval(
    gains: Sequence[float],
    clusters: Sequence[str],
    config: GateConfig,
    *,
    cells: Sequence[tuple[str, str]] | None = None,
    runs: Sequence[object] | None = None,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a macro-averaged mean, whole clusters resampled with replacement.

    Args:
        gains: paired differences, [n].
        clusters: the image each belongs to, [n].
        config: number of resamples and two-sided confidence.
        cells: (outer, inner) group of each, [n]; the statistic is the mean over outer groups of the mean
            over inner groups of the mean. None is the plain mean. A group absent from a resample is left out.
        runs: the training run each belongs to, [n], where several runs answered the same questions. Runs are
            then resampled too, independently of clusters: the pigeonhole bootstrap (Owen 2007). It overstates
            what single answers vary by, and with R runs sees (R - 1) / R of the variance between runs.
        seed: of the resampling.
    """
    values = np.asarray(gains, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise InvalidInput("A compared value is missing or not a number.", remedy="Score every item again.")
    units = [*zip(clusters, *([] if runs is None else [runs]), strict=True)]
    sums, counts, outer = _tables(values, units, cells or [("", "")] * len(values))
    weights = _weights(list(dict.fromkeys(units)), config.resamples, np.random.default_rng(seed))
    draws = _macro(weights @ sums, weights @ counts, outer)
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(draws, (tail, 1 - tail))
    observed = _macro(sums.sum(axis=0, keepdims=True), counts.sum(axis=0, keepdims=True), outer)
    return Interval(mean=float(observed[0]), low=float(low), high=float(high))


def _weights(units: Sequence[tuple[object, ...]], resamples: int, rng: np.random.Generator) -> Floats:
    """[resamples, units]: how often each unit is drawn when each of its labels is drawn by itself."""
    weights = np.ones((resamples, len(units)))
    for labels in zip(*units, strict=True):
        rows = _numbered(labels)
        number = max(rows) + 1
        weights *= rng.multinomial(number, np.full(number, 1 / number), size=resamples)[:, rows]
    return weights


def _tables(
    values: Floats, units: Sequence[tuple[object, ...]], cells: Sequence[tuple[str, str]]
) -> tuple[Floats, Floats, Floats]:
    """Sum and count per (unit, cell), both [units, cells], and membership [cells, outer groups]."""
    rows = _numbered(units)
    columns = _numbered(cells)
    shape = (max(rows) + 1, max(columns) + 1)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (rows, columns), values)
    np.add.at(counts, (rows, columns), 1.0)
    outer = np.eye(len({group for group, _ in cells}))[
        _numbered([group for group, _ in dict.fromkeys(cells)])
    ]
    return sums, counts, outer


def _numbered(labels: Sequence[object]) -> list[int]:
    order = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return [order[label] for label in labels]


def _macro(sums: Floats, counts: Floats, outer: Floats) -> Floats:
    """[resamples]: mean over present outer groups of the mean over their present cells of the cell's mean."""
    present = counts > 0
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=present)
    cells = present.astype(np.float64) @ outer
    groups = np.divide(means @ outer, cells, out=np.zeros_like(cells), where=cells > 0)
    return np.asarray(groups.sum(axis=1) / (cells > 0).sum(axis=1))


def _verdict(
    differences: Mapping[str, Interval], outcomes: Sequence[Outcome], config: GateConfig
) -> tuple[GateVerdict, tuple[str, ...]]:
    too_few = _too_few(outcomes, config)
    if too_few:
        return GateVerdict.INCONCLUSIVE, too_few
    guards = {HALLUCINATION: (1, config.hallucination_margin), DEPENDENCE: (-1, config.dependence_margin)}
    findings = [_target(config.target, differences[config.target])]
    findings += [_guard(name, differences.get(name), *rule) for name, rule in guards.items()]
    verdicts = [verdict for verdict, _ in findings]
    reasons = tuple(reason for _, reason in findings)
    for worst in (GateVerdict.FAIL, GateVerdict.INCONCLUSIVE):
        if worst in verdicts:
            return worst, reasons
    return GateVerdict.PASS, reasons


def _too_few(outcomes: Sequence[Outcome], config: GateConfig) -> tuple[str, ...]:
    images = len({outcome.cluster for outcome in outcomes})
    needs = ((len(outcomes), config.min_questions, "questions"), (images, MIN_IMAGES, "images"))
    return tuple(
        f"Only {have} {what}; at least {need} are needed." for have, need, what in needs if have < need
    )


def _target(name: str, difference: Interval) -> tuple[GateVerdict, str]:
    if difference.low > 0:
        return GateVerdict.PASS, f"{name} is better: {_shown(difference)}."
    if difference.high < 0:
        return GateVerdict.FAIL, f"{name} is worse: {_shown(difference)}."
    return GateVerdict.INCONCLUSIVE, f"{name} is not shown to be better: {_shown(difference)}."


def _guard(name: str, difference: Interval | None, worse: int, margin: float) -> tuple[GateVerdict, str]:
    """`worse` is the sign of harm: +1 where more is worse, -1 where less is."""
    if difference is None:
        return GateVerdict.INCONCLUSIVE, f"{name} was not measured, so harm cannot be ruled out."
    mean = worse * difference.mean
    near, far = sorted((worse * difference.low, worse * difference.high))
    if mean <= margin:
        doubt = f", though the interval reaches beyond the margin of {margin:g}" if far > margin else ""
        return GateVerdict.PASS, f"{name} is not worse beyond its margin: {_shown(difference)}{doubt}."
    if near > 0:
        return GateVerdict.FAIL, f"{name} is worse beyond its margin of {margin:g}: {_shown(difference)}."
    return (
        GateVerdict.INCONCLUSIVE,
        f"{name} may be worse beyond its margin of {margin:g}: {_shown(difference)}.",
    )


def _shown(difference: Interval) -> str:
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
