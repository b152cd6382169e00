"""An evaluation as something to read: a table for the terminal, the same as Markdown."""

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hscr.evaluate.metrics import (
    ACCURACY,
    BLANK,
    DEPENDENCE,
    DROPPED,
    HALLUCINATION,
    KIND,
    MACRO,
    OMISSION,
    PARSED,
)
from hscr.records import Evaluation, GateVerdict

_LABELS = {
    MACRO: "macro score, full image",
    DROPPED: "macro score, visual tokens dropped",
    BLANK: "macro score, blank image",
    DEPENDENCE: "visual dependence (nats)",
    HALLUCINATION: "captions with a hallucinated finding",
    OMISSION: "captions with an omitted finding",
    ACCURACY: "accuracy, all questions alike",
    PARSED: "answers in the grammar",
}
"""In the order of reading; kinds and any other metric follow."""

_COLOURS = {GateVerdict.PASS: "green", GateVerdict.FAIL: "red", GateVerdict.INCONCLUSIVE: "yellow"}
_NONE = "–"


def rendered(evaluation: Evaluation) -> Group:
    """For `rich.print`: what was asked, one row per metric, the verdict and why."""
    header, *rows = _cells(evaluation)
    table = Table(title=_title(evaluation), title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    verdict = Text(f"Gate: {evaluation.verdict.value}", style=f"bold {_COLOURS[evaluation.verdict]}")
    return Group(table, verdict, *(Text(f"  - {reason}") for reason in evaluation.reasons))


def markdown(evaluation: Evaluation) -> str:
    """The same as a standalone Markdown document."""
    header, *rows = _cells(evaluation)
    rule = ["---", *("---:" for _ in header[1:])]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
    reasons = "\n".join(f"- {reason}" for reason in evaluation.reasons)
    made = f"Evaluation `{evaluation.id}` of {evaluation.created_at:%Y-%m-%d %H:%M} UTC."
    parts = (f"# {_title(evaluation)}", made, table, f"**Gate: {evaluation.verdict.value}**", reasons, _NOTES)
    return "\n\n".join(part for part in parts if part) + "\n"


_NOTES = (
    "The macro score is the mean over question kinds of the mean over truth classes, so a mere shift of "
    "prior gains nothing. Differences are candidate - active with a 95 % bootstrap interval, paired and "
    "resampled by image. Visual dependence says how much the image changed the words; it is no explanation. "
    "Research use only."
)


def _title(evaluation: Evaluation) -> str:
    candidate, active = (name or "base" for name in (evaluation.candidate, evaluation.active))
    asked = f"{evaluation.questions} questions about {evaluation.images} images"
    return f"{candidate} against {active} on {evaluation.suite} ({asked})"


def _cells(evaluation: Evaluation) -> Iterator[list[str]]:
    versions = list(evaluation.scores)
    yield ["metric", *versions, "difference"]
    for metric in _metrics(evaluation):
        values = (evaluation.scores[version].get(metric) for version in versions)
        yield [_label(metric), *(_number(value) for value in values), _difference(evaluation, metric)]


def _metrics(evaluation: Evaluation) -> list[str]:
    measured = {metric for scores in evaluation.scores.values() for metric in scores}
    measured |= evaluation.differences.keys()
    known = [metric for metric in _LABELS if metric in measured]
    return known + sorted(measured - set(known), key=lambda metric: (not metric.startswith(KIND), metric))


def _label(metric: str) -> str:
    kind = metric.removeprefix(KIND)
    return _LABELS.get(metric, f"· {kind}" if kind != metric else metric)


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


def _difference(evaluation: Evaluation, metric: str) -> str:
    difference = evaluation.differences.get(metric)
    if difference is None:
        return _NONE
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
