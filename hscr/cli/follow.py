"""Watching a job, and the jobs it starts, until the last one has ended."""

from functools import partial

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hscr.cli.common import complaints, console, print_json
from hscr.client import Client
from hscr.records import Job, JobEvent


def report(client: Client, job: Job, *, wait: bool, as_json: bool) -> None:
    """Show the submitted job, or with `wait` its story and its successors' to the end.

    Raises the error of the first job that failed.
    """
    jobs = _to_the_end(client, job, quiet=as_json) if wait else [job]
    if as_json:
        print_json([each.model_dump(mode="json") for each in jobs])
        return
    for each in jobs:
        console.print(f"[bold]{each.kind}[/] {each.id} {each.state}")
        for name, value in (each.result or {}).items():
            console.print(f"    {name}: {_short(value)}", markup=False)
    if not wait:
        console.print("`hscr status` shows how it goes.")


def _to_the_end(client: Client, job: Job, *, quiet: bool) -> list[Job]:
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(),
    )
    done: list[Job] = []
    following: Job | None = job
    with Progress(*columns, console=complaints, disable=quiet) as bars:
        while following is not None:
            task = bars.add_task(following.kind, total=None, what="queued")
            done.append(client.wait(following.id, partial(_advance, bars, task)))
            following = client.next_job(following.id)
    return done


def _advance(bars: Progress, task: TaskID, event: JobEvent) -> None:
    data = event.data
    if event.type == "progress":
        bars.update(task, completed=data["done"], total=data["total"], what=data.get("what", ""))
    elif event.type == "state":
        bars.update(task, what=data["state"])


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
