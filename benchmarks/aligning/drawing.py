"""Differences to the base model with their intervals; small dots are single seeds."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.aligning.arms import ARMS
from benchmarks.aligning.findings import Findings

_SHOWN = {
    "macro_score": "macro score",
    "open": "open",
    "closed": "closed",
    "hallucination_rate": "captions hallucinating",
    "visual_dependence": "visual dependence (nats)",
}


def draw(path: Path, settings: Mapping[str, Findings]) -> None:
    """Write a PNG: a row of plots per setting, a point and its 95 % interval per arm."""
    arms = ARMS[1:]
    figure = Figure(figsize=(14, 1 + 2.2 * len(settings)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(settings), len(_SHOWN), sharey=True, sharex="col", squeeze=False)
    for line, (setting, found) in zip(grid, settings.items(), strict=True):
        for axes, (metric, label) in zip(line, _SHOWN.items(), strict=True):
            for row, arm in enumerate(arms):
                measured = found[metric][arm.name]
                gain = measured.gain
                assert gain is not None
                reach = [[gain.mean - gain.low], [gain.high - gain.mean]]
                axes.errorbar([gain.mean], [row], xerr=reach, fmt="o", color="C0", capsize=3)
                axes.scatter(measured.seeds, [row] * len(measured.seeds), s=8, c="0.5", zorder=3)
            axes.axvline(0, color="C3", linewidth=1)
            axes.set(yticks=range(len(arms)), ylim=(len(arms) - 0.5, -0.5))
            axes.set_title(f"{setting}: {label}", fontsize=10)
            axes.locator_params(axis="x", nbins=4)
            axes.set_yticklabels([arm.label for arm in arms])
            axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("difference to the base model", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
