"""The loop's steps on files alone, without a stack: what `--out`, `--records` and `--adapter` ask for."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from hscr.cli.common import complaints, console, open_store, print_json
from hscr.config import LoopConfig
from hscr.records import Interval
from hscr.rows.source import open_rows
from hscr.store.export.form import Form

if TYPE_CHECKING:
    from hscr.store.export.write import Exported

_SKIPS_SHOWN = 20


class Folders(NamedTuple):
    """Of the base model, what image paths start from, the new records, and an adapter to answer with."""

    model: Path
    images: Path | None
    out: Path
    adapter: Path | None


class Pace(ProgressColumn):
    """Rows per second and the time left, by all that this process did; of a task of `rows_done`.

    The rows of a batch are reported in one burst, however long it took: rich's own columns, which look at the
    last 30 seconds, then measure the burst.
    """

    def render(self, task: Task) -> Text:
        started, reported, remaining = task.start_time, task.fields.get("reported"), task.remaining
        if reported is None or started is None or remaining is None or reported == started:
            return Text("")
        speed = (task.completed - task.fields["before"]) / (reported - started)
        left = max(0, remaining / speed - (task.get_time() - reported))
        return Text(f"{speed:.2f} rows/s, {timedelta(seconds=round(left))} left")


def rows_done(bars: Progress) -> Callable[[int, int], None]:
    """A new task's `on_progress(rows done, rows)`."""
    task, before = bars.add_task("generate", total=None), 0

    def advance(done: int, total: int) -> None:
        nonlocal before
        if bars.tasks[task].total is None:
            # The first report of a resumed run is where it goes on: no work of this process.
            before = done
            bars.reset(task, completed=done, total=total)
        elif done > before:
            bars.update(task, completed=done, before=before, reported=bars.get_time())

    return advance


def generate(
    rows: str, folders: Folders, loop: LoopConfig, options: Mapping[str, Any], *, as_json: bool
) -> None:
    source = open_rows(rows, folders.images)
    from hscr.runs.run import RunOptions, generate_records  # torch

    columns = (TextColumn("generate"), BarColumn(), MofNCompleteColumn(), Pace(), TextColumn("after"))
    with Progress(*columns, TimeElapsedColumn(), console=complaints) as bars:
        try:
            summary = generate_records(
                folders.model, source, folders.out, loop.generate, adapter=folders.adapter,
                options=RunOptions(**options), on_progress=rows_done(bars),
            )  # fmt: skip
        except KeyboardInterrupt:
            complaints.print(f"Stopped; --resume goes on in {folders.out}.", markup=False)
            raise
    _show_skips(folders.out, summary.skipped)
    counts = summary.model_dump(include={"rows", "records", "responses", "skipped", "skipped_by"})
    if as_json:
        print_json({"path": folders.out, **counts})
        return
    made = f"{summary.records} records of {summary.rows} rows"
    console.print(f"{folders.out}: {made}; see {folders.out / 'summary.html'}")


def _show_skips(out: Path, skipped: int) -> None:
    from hscr.runs.folder import SKIPPED
    from hscr.runs.produce import Skip

    with (out / SKIPPED).open(encoding="utf-8") as file:
        skips = [Skip.model_validate_json(line) for line in islice(file, _SKIPS_SHOWN)]
    lines = [f"skipped {skip.id or skip.place}: {skip.reason}" for skip in skips]
    if skipped > len(skips):
        lines.append(f"… and {skipped - len(skips)} more in {out / SKIPPED}")
    for line in lines:
        complaints.print(line, markup=False, highlight=False)


def export(records: Path, out: Path, form: Form, *, as_json: bool) -> None:
    from hscr.store.export.read import read_records
    from hscr.store.export.write import export as write

    _show_export(write(read_records(records), out, form), as_json=as_json)


def export_live(home: Path, method: str, out: Path, form: Form, *, as_json: bool) -> None:
    from hscr.runs.canonical import Stored
    from hscr.store.export.write import export as write

    with open_store(home) as store:
        live = store.preferences.live(method=method, limit=1_000_000)
        stored = (Stored(record, store.blobs.get(record.image_digest), {}) for record in live)
        _show_export(write(stored, out, form), as_json=as_json)


def finetune(
    model: Path, records: Path, out: Path, loop: LoopConfig, options: dict[str, Any], *, as_json: bool
) -> None:
    from hscr import local  # torch
    from hscr.learn.trainer import checkpoints_beside

    leads = os.environ.get("RANK", "0") == "0"  # of the processes of `accelerate launch`, one speaks
    ended, kept = (out / "adapter_config.json").is_file(), checkpoints_beside(out).glob("checkpoint-*")
    if leads and options["resume"] and not ended and not any(kept):
        complaints.print("There is no checkpoint to go on from: training begins anew.")
    with Progress(console=complaints, disable=not leads) as bars:
        task = bars.add_task("finetune", total=None)

        def advance(step: int, steps: int, metrics: dict[str, float]) -> None:
            bars.update(task, completed=step, total=steps, description=f"loss {metrics['loss']:.3f}")

        def resumed(step: int) -> None:
            if leads:
                complaints.print(f"Goes on after step {step}.")

        result = local.finetune_records(
            model, records, out, loop.finetune, on_progress=advance, on_resumed=resumed, **options
        )
    if not leads:
        return
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


def evaluate(model: Path, adapter: Path, loop: LoopConfig, where: dict[str, str], *, as_json: bool) -> None:
    from hscr import local  # torch

    with Progress(console=complaints) as bars:
        task = bars.add_task("evaluate", total=None)
        compared = local.evaluate_adapter(
            model, adapter, loop.evaluate, **where,
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


def _show_export(done: "Exported", *, as_json: bool) -> None:
    if as_json:
        print_json(done._asdict())
        return
    console.print(f"{done.path}: {done.records} records in {done.rows} rows about {done.images} images")


def _scores(scores: dict[str, dict[str, float]], differences: dict[str, Interval]) -> Table:
    table = Table("score", *scores, "difference, 95 % interval")
    for name in next(iter(scores.values())):
        gap = differences.get(name)
        shown = f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})" if gap else ""
        table.add_row(name, *(f"{each[name]:.3f}" for each in scores.values()), shown)
    return table
