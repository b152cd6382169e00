"""Seconds against records, for each contestant, beside the line of exact proportion and the floor."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure


def draw(path: Path, seconds: Mapping[str, Mapping[int, float]], floor_s: float, title: str) -> None:
    """Write a PNG. seconds: per contestant, by number of records; floor_s belongs to the largest number."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, by_size in seconds.items():
        sizes = sorted(by_size)
        (line,) = axes.plot(sizes, [by_size[size] for size in sizes], marker="o", label=name)
        per_record = by_size[sizes[-1]] / sizes[-1]
        axes.plot(sizes, [per_record * size for size in sizes], ls=":", color=line.get_color())
    axes.plot(sizes, [floor_s * size / sizes[-1] for size in sizes], color="black", label="floor")
    axes.set(xlabel="records", ylabel="seconds", yscale="log", title=title)
    axes.legend(title="dotted: proportional")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
