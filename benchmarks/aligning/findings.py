"""What one setting found: scores of each arm and their differences to the base model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.aligning.arms import ARMS, VIEWS
from hscr.ablate.measures import METRICS, Metric, Value, Values, difference, level
from hscr.ablate.report import piped, spread
from hscr.ablate.results import ArmRun
from hscr.ablate.suites import BASE
from hscr.config import GateConfig
from hscr.evaluate.metrics import score
from hscr.evaluate.outcome import Outcome
from hscr.evaluate.suites import Suite
from hscr.records import Interval

Runs = Mapping[str, Sequence[ArmRun]]
"""By arm, its run under each seed."""
MACRO = "macro_score"


@dataclass(frozen=True)
class Measured:
    """One metric of one arm: its mean over seeds, its gain on the base model, and that of each seed."""

    score: Interval
    gain: Interval | None
    seeds: tuple[float, ...]


Findings = Mapping[str, Mapping[str, Measured]]
"""By metric and arm."""


def metrics(suite: Suite) -> dict[str, Metric]:
    """The ablations' of answers, and accuracy on each view beside what full pictures gain on dropped ones.

    Accuracy is the plain mean over questions; open, closed and macro score weigh kinds and truth classes
    alike.
    """
    shared = [metric for name, metric in METRICS.items() if name != "probability"]
    full = Metric("accuracy", "accuracy", "full", lambda run, _: _accuracy(suite, run.answers))
    gap = Metric("dropped_gap", "accuracy(full) − accuracy(dropped)", "gap", _gap(suite))
    views = [
        Metric(f"accuracy_{view}", f"accuracy, {view}", view, _accuracy_under(suite, view)) for view in VIEWS
    ]
    return {metric.name: metric for metric in (*shared, full, gap, *views)}


def findings(suite: Suite, runs: Runs, config: GateConfig) -> Findings:
    """Every arm is compared with the base model on the same questions, paired by question and seed."""
    outcomes = {
        arm: [[score(item, run.answers[item.id]) for item in suite.items] for run in each]
        for arm, each in runs.items()
    }
    return {name: _measured(metric, runs, outcomes, config) for name, metric in metrics(suite).items()}


def _measured(
    metric: Metric, runs: Runs, outcomes: Mapping[str, list[list[Outcome]]], config: GateConfig
) -> dict[str, Measured]:
    values = {
        arm: [metric.values(run, scored) for run, scored in zip(each, outcomes[arm], strict=True)]
        for arm, each in runs.items()
    }
    base = values[BASE.name]
    found = {}
    for arm, each in values.items():
        shown = level(each, config)
        assert shown is not None, f"the suite has nothing that {metric.name} is about"
        gain = None if arm == BASE.name else difference(each, base, config)
        found[arm] = Measured(
            shown, gain, tuple(_gain(a, b, config) for a, b in zip(each, base, strict=True))
        )
    return found


def _gain(arm: Values, base: Values, config: GateConfig) -> float:
    gap = difference([arm], [base], config)
    assert gap is not None
    return gap.mean


def _accuracy(suite: Suite, answers: Mapping[str, str]) -> Values:
    return {item.id: Value(score(item, answers[item.id]).score, item.image_cluster) for item in suite.items}


def _accuracy_under(suite: Suite, view: str) -> Callable[[ArmRun, Sequence[Outcome]], Values]:
    return lambda run, _outcomes: _accuracy(suite, run.views[view])


def _gap(suite: Suite) -> Callable[[ArmRun, Sequence[Outcome]], Values]:
    def values(run: ArmRun, _outcomes: Sequence[Outcome]) -> Values:
        full, dropped = _accuracy(suite, run.answers), _accuracy(suite, run.views["dropped"])
        return {key: Value(full[key].value - dropped[key].value, full[key].cluster) for key in full}

    return values


_TABLES = {
    "Differences to the base model": (MACRO, "open", "closed", "hallucination_rate", "omission_rate"),
    "What the image is used for": (
        "visual_dependence",
        "accuracy",
        "dropped_gap",
        *(f"accuracy_{view}" for view in VIEWS),
    ),
}


def markdown(suite: Suite, found: Findings, runs: Runs) -> str:
    """Two tables: what the arms gain on the base model, whose own scores head each; what they learnt from."""
    named = metrics(suite)
    parts = []
    for title, columns in _TABLES.items():
        rows = [_row(arm.name, arm.label, [found[name][arm.name] for name in columns]) for arm in ARMS]
        parts.append(f"**{title}**\n\n" + piped([["arm", *(named[name].label for name in columns)], *rows]))
    return "\n\n".join([*parts, f"**Each seed**\n\n{piped(_by_seed(found, runs))}"]) + "\n"


def _row(arm: str, label: str, cells: Sequence[Measured]) -> list[str]:
    if arm == BASE.name:
        return [f"{label} (scores)", *(f"{cell.score.mean:.3f}" for cell in cells)]
    return [label, *(spread(cell.gain) for cell in cells)]


def _by_seed(found: Findings, runs: Runs) -> list[list[str]]:
    header = [
        "arm",
        "macro score − base, by seed",
        "records",
        "with 2 or more levels",
        "log-ratio of preferred",
    ]
    rows = [header]
    for arm in ARMS[1:]:
        each = runs[arm.name]
        gains = ", ".join(f"{gain:+.3f}" for gain in found[MACRO][arm.name].seeds)
        records = ", ".join(str(run.records) for run in each)
        several = ", ".join(str(run.records - run.levels.get(1, 0)) for run in each)
        ratios = ", ".join(f"{run.metrics['logratio/chosen']:+.2f}" for run in each)
        rows.append([arm.label, gains, records, several, ratios])
    return rows


def line(setting: str, suite: Suite, found: Findings, runs: Runs) -> dict[str, Any]:
    """One setting's last line: numbers in the units of the tables, intervals as [low, high]."""
    return {
        "setting": setting,
        "seeds": len(runs[BASE.name]),
        "questions": len(suite.items),
        "images": len({item.image_cluster for item in suite.items}),
        "arms": {arm.name: {name: _numbers(found[name][arm.name]) for name in found} for arm in ARMS},
    }


def _numbers(measured: Measured) -> dict[str, Any]:
    shown: dict[str, Any] = {"mean": round(measured.score.mean, 4)}
    if measured.gain is not None:
        shown["minus_base"] = round(measured.gain.mean, 4)
        shown["ci95"] = [round(measured.gain.low, 4), round(measured.gain.high, 4)]
        shown["by_seed"] = [round(gain, 4) for gain in measured.seeds]
    return shown
