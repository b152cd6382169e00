"""A suite as a picture: above, scores and small dots for the seeds; below, differences to the method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hscr.ablate.findings import ArmFindings, Findings
from hscr.ablate.measures import METRICS
from hscr.ablate.suites import HSCR
from hscr.records import Interval

_SHOWN = ("open", "closed", "macro_score", "hallucination_rate")


def plot(found: Findings, path: Path) -> None:
    """Write a PNG: a point per arm and its 95 % interval."""
    others = [arm for arm in found.arms if arm.name != HSCR]
    figure = Figure(figsize=(13, 2 + 0.35 * (len(found.arms) + len(others))), layout="constrained")
    FigureCanvasAgg(figure)
    heights = {"height_ratios": [len(found.arms), len(others)]}
    above, below = figure.subplots(2, len(_SHOWN), sharey="row", gridspec_kw=heights)
    for axes, metric in zip(above, _SHOWN, strict=True):
        _points(axes, found.arms, [arm.scores for arm in found.arms], metric)
        for row, arm in enumerate(found.arms):
            seeds = [seed.scores[metric] for seed in arm.seeds]
            axes.scatter(seeds, [row] * len(seeds), s=8, c="0.5", zorder=3)
        axes.set_title(METRICS[metric].label)
    for axes, metric in zip(below, _SHOWN, strict=True):
        _points(axes, others, [arm.differences for arm in others], metric)
        axes.axvline(0, color="C3", linewidth=1)
        axes.set_xlabel("difference to HSCR")
    figure.suptitle(f"{found.title}: mean over {len(found.arms[0].seeds)} seeds, 95 % interval", fontsize=10)
    figure.savefig(path, dpi=110)


def _points(
    axes: Axes, arms: Sequence[ArmFindings], values: Sequence[Mapping[str, Interval]], metric: str
) -> None:
    for row, (arm, shown) in enumerate(zip(arms, values, strict=True)):
        value = shown[metric]
        reach = [[value.mean - value.low], [value.high - value.mean]]
        colour = "C3" if arm.name == HSCR else "C0"
        axes.errorbar([value.mean], [row], xerr=reach, fmt="o", color=colour, capsize=3)
    axes.set(yticks=range(len(arms)), ylim=(len(arms) - 0.5, -0.5))
    axes.set_yticklabels([arm.label for arm in arms])
    axes.grid(axis="x", alpha=0.3)
