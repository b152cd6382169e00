"""The 99th percentile against utilisation, a panel for each number of replicas."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def draw(
    path: Path, utilisations: Sequence[float], p99: Mapping[int, Mapping[str, Sequence[float]]], goal_s: float
) -> None:
    """Write a PNG. p99: seconds per utilisation, by number of replicas and arrangement."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panels = figure.subplots(2, (len(p99) + 1) // 2, sharex=True, sharey=True, squeeze=False).flat
    for axes, (replicas, by_name) in zip(panels, p99.items(), strict=False):
        for name, seconds in by_name.items():
            axes.plot(utilisations, seconds, marker=".", label=name)
        axes.axhline(goal_s, color="grey", ls=":")
        axes.set(title=f"{replicas} replica{'s' * (replicas > 1)}", ylim=(0, 1.6 * goal_s))
    figure.supxlabel("utilisation")
    figure.supylabel("99th percentile of an answer's time, s")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
