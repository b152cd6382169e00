"""A suite's findings to read: tables for the terminal, the same as Markdown."""

from collections.abc import Sequence
from statistics import fmean

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hscr.ablate.findings import ArmFindings, Findings
from hscr.ablate.measures import METRICS, Finding
from hscr.ablate.suites import HSCR
from hscr.records import Interval

Cells = list[list[str]]
"""A table: its header, then its rows."""

_NONE = "–"
_COLOURS: dict[str, str] = {
    Finding.AGREES: "green",
    Finding.DISAGREES: "red",
    Finding.NOT_DISTINGUISHABLE: "yellow",
}
_MAIN = ("open", "closed", "macro_score")
_NOTES = (
    "Open and closed are macro-averaged over question kinds and truth classes, so that another prior gains "
    "nothing; closed are the questions answered with yes or no; the macro score has captions too. Intervals "
    "are 95 %: questions are paired between arms, and images and seeds are resampled independently "
    "(pigeonhole bootstrap), so that both a lucky seed and a lucky image widen them. They are not corrected "
    "for the number of comparisons, and of the spread between R seeds they show (R − 1)/R."
)


def rendered(found: Findings) -> Group:
    """For `rich.print`: what fits a terminal."""
    scores = _table(f"Scores, mean of {_seeds(found)}", _means(found))
    gaps = _table("Differences to HSCR, 95 % interval", _differences(found, _MAIN))
    claims = _table("The paper's orderings", _orderings(found))
    return Group(Text(_title(found), style="bold"), Text(_budget(found)), scores, gaps, claims)


def markdown(found: Findings, plot: str) -> str:
    """A standalone document that shows the picture `plot` beside it."""
    names = _measured(found)
    tables = {
        "Scores": _scores(found, names),
        "Differences to HSCR": _differences(found, names),
        "What the arms were trained on": _trained(found),
        "The paper's orderings": _orderings(found),
    }
    picture = f"![scores of the arms with their intervals]({plot})"
    shown = [f"**{title}**\n\n{piped(cells)}" for title, cells in tables.items()]
    return "\n\n".join([f"# {_title(found)}", _budget(found), picture, *shown, _NOTES]) + "\n"


def _title(found: Findings) -> str:
    return f"Ablation {found.suite}: {found.title} ({found.table})"


def _budget(found: Findings) -> str:
    setting, evaluate = found.setting, found.setting.loop.evaluate
    return (
        f"Each trained arm: the same {setting.records} questions of the {setting.mix} mix per seed, "
        f"{setting.steps} steps of {setting.loop.finetune.batch_size} records, {_seeds(found)}. "
        f"Asked: {found.questions} questions about {found.images} images of the {evaluate.split} split."
    )


def _seeds(found: Findings) -> str:
    count = len(found.arms[0].seeds)
    return f"{count} seeds" if count > 1 else "1 seed"


def _measured(found: Findings) -> list[str]:
    return [name for name in METRICS if any(name in arm.scores for arm in found.arms)]


def _means(found: Findings) -> Cells:
    names = _measured(found)
    rows = [[arm.label, *(_number(arm.scores.get(name)) for name in names)] for arm in found.arms]
    return [["arm", *(METRICS[name].short for name in names)], *rows]


def _scores(found: Findings, names: Sequence[str]) -> Cells:
    header = ["arm", *(METRICS[name].label for name in names)]
    rows = [[arm.label, *(spread(arm.scores.get(name), "") for name in names)] for arm in found.arms]
    return [header, *rows]


def _differences(found: Findings, names: Sequence[str]) -> Cells:
    header = ["arm", *(METRICS[name].label for name in names)]
    others = [arm for arm in found.arms if arm.name != HSCR]
    return [header, *([arm.label, *(spread(arm.differences.get(name)) for name in names)] for arm in others)]


def _trained(found: Findings) -> Cells:
    """Per seed the number of records and of levels; means over seeds of the trainer's last epoch."""
    header = ["arm", "records", "with 1/2/3/… levels", "log-ratio of preferred", "reward accuracy"]
    return [header, *(_training(arm) for arm in found.arms if arm.seeds[0].records)]


def _training(arm: ArmFindings) -> list[str]:
    levels = [
        "/".join(str(seed.levels.get(count, 0)) for count in range(1, max(seed.levels) + 1))
        for seed in arm.seeds
    ]
    records = ", ".join(str(seed.records) for seed in arm.seeds)
    return [arm.label, records, ", ".join(levels), *(_last(arm, name) for name in _LAST)]


_LAST = ("logratio/chosen", "rewards/accuracies")


def _last(arm: ArmFindings, name: str) -> str:
    values = [seed.metrics[name] for seed in arm.seeds if name in seed.metrics]
    return f"{fmean(values):+.2f}" if values else _NONE


def _orderings(found: Findings) -> Cells:
    """Each ordering of the paper and what becomes of it; pairs it has no one ordering of come last."""
    labels = {arm.name: arm.label for arm in found.arms}
    rows = [
        [f"{claim.metric}: {labels[claim.better]} > {labels[claim.worse]}", spread(gap), finding.value]
        for claim, finding, gap in ((each.claim, each.finding, each.difference) for each in found.orderings)
    ]
    unclear = [
        [f"{metric}: {labels[first]} > {labels[second]} on {', '.join(wins)} only", _NONE, "no claim"]
        for metric, (first, second), wins in found.mixed
    ]
    return [["in the paper", "measured", "finding"], *rows, *unclear]


def _number(value: Interval | None) -> str:
    return _NONE if value is None else f"{value.mean:.3f}"


def spread(value: Interval | None, sign: str = "+") -> str:
    if value is None:
        return _NONE
    mean, low, high = (f"{number:{sign}.3f}" for number in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def _table(title: str, cells: Cells) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if number else "left")
    for row in cells[1:]:
        table.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    return table


def piped(cells: Cells) -> str:
    header, *rows = cells
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
