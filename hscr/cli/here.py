"""The loop's steps on files alone, without a stack: what `--out`, `--records` and `--adapter` ask for."""

from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress
from rich.table import Table

from hscr.cli.common import complaints, console, print_json
from hscr.config import LoopConfig
from hscr.records import Interval
from hscr.store.export import IMAGES, Exported


class Folders(NamedTuple):
    """Of the base model, the rows' images, the new records, and an adapter to answer with."""

    model: Path
    images: Path
    out: Path
    adapter: Path | None


def generate(rows: Path, folders: Folders, loop: LoopConfig, *, as_json: bool) -> None:
    from hscr import local  # torch

    with Progress(console=complaints) as bars:
        task = bars.add_task("generate", total=None)
        made = local.generate_records(
            folders.model, rows, folders.images, folders.out, loop.generate, adapter=folders.adapter,
            on_progress=lambda done, total: bars.update(task, completed=done, total=total),
        )  # fmt: skip
    for skip in made.skipped:
        complaints.print(f"skipped {skip.source_id}: {skip.reason}", markup=False, highlight=False)
    show_export(made.exported, as_json=as_json)


def finetune(model: Path, records: Path, out: Path, loop: LoopConfig, *, as_json: bool) -> None:
    from hscr import local  # torch

    with Progress(console=complaints) as bars:
        task = bars.add_task("finetune", total=None)

        def advance(step: int, steps: int, metrics: dict[str, float]) -> None:
            bars.update(task, completed=step, total=steps, description=f"loss {metrics['loss']:.3f}")

        result = local.finetune_records(model, records, out, loop.finetune, on_progress=advance)
    for warning in result.warnings:
        complaints.print(warning, markup=False)
    if as_json:
        print_json({"path": result.path, "metrics": result.metrics, "warnings": result.warnings})
        return
    table = Table("metric of the last epoch", "value")
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    console.print(f"The adapter is in {out}; `hscr evaluate --adapter {out}` judges it.")


def evaluate(model: Path, adapter: Path, loop: LoopConfig, *, as_json: bool) -> None:
    from hscr import local  # torch

    with Progress(console=complaints) as bars:
        task = bars.add_task("evaluate", total=None)
        compared = local.evaluate_adapter(
            model, adapter, loop.evaluate,
            on_progress=lambda done, total: bars.update(task, completed=done, total=total),
        )  # fmt: skip
    verdict, reasons, differences = compared.judgement
    if as_json:
        judged = {name: difference.model_dump() for name, difference in differences.items()}
        scores = {"scores": compared.scores, "differences": judged}
        print_json({"verdict": verdict, "reasons": reasons, **scores})
        return
    console.print(_scores(compared.scores, differences))
    console.print(f"The gate: [bold]{verdict}[/]")
    for reason in reasons:
        console.print(f"    {reason}", markup=False)


def show_export(done: Exported, *, as_json: bool) -> None:
    if as_json:
        print_json(done._asdict())
        return
    console.print(
        f"{done.path}: {done.records} records in {done.rows} rows; {done.images} images in {IMAGES}/"
    )


def _scores(scores: dict[str, dict[str, float]], differences: dict[str, Interval]) -> Table:
    table = Table("score", *scores, "difference, 95 % interval")
    for name in next(iter(scores.values())):
        gap = differences.get(name)
        shown = f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})" if gap else ""
        table.add_row(name, *(f"{each[name]:.3f}" for each in scores.values()), shown)
    return table
