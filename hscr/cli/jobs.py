"""`hscr jobs`: what is under way, what failed and why, and to have it done again."""

from typing import Annotated

import typer
from rich.table import Table

from hscr.cli.common import URL, AsJson, Key, Url, console, print_json
from hscr.cli.follow import report
from hscr.client import Client
from hscr.records import Job, JobKind, JobState

JobId = Annotated[str, typer.Argument(help="As `hscr jobs list` shows it.", show_default=False)]
Kind = Annotated[JobKind | None, typer.Option(help="Only these.")]
State = Annotated[JobState | None, typer.Option(help="Only these; `failed` ones say why.")]
Wait = Annotated[bool, typer.Option("--wait", help="Follow it, and the jobs it starts, to the end.")]

jobs = typer.Typer(no_args_is_help=True, help="Jobs: list them, stop one, submit one again.")


@jobs.command("list")
def list_(
    *,
    kind: Kind = None,
    state: State = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="At most so many, the newest.")] = 20,
    url: Url = URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show jobs, newest first, and what went wrong.

    Example:

        hscr jobs list --state failed
    """
    filters = {name: value.value for name, value in {"kind": kind, "state": state}.items() if value}
    with Client(url, key) as client:
        found = client.jobs(limit=limit, **filters)
    if as_json:
        print_json([job.model_dump(mode="json") for job in found])
        return
    console.print(job_table(found))


@jobs.command()
def cancel(job_id: JobId, *, url: Url = URL, key: Key = None, as_json: AsJson = False) -> None:
    """Stop a job: a queued one at once, a running one within seconds.

    Example:

        hscr jobs cancel job_0f3a...
    """
    with Client(url, key) as client:
        report(client, client.cancel(job_id), wait=False, as_json=as_json)


@jobs.command()
def retry(
    job_id: JobId,
    *,
    wait: Wait = False,
    url: Url = URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Submit a failed or cancelled job again, as a new one. Asked twice, it is the same new one.

    Example:

        hscr jobs retry job_0f3a... --wait
    """
    with Client(url, key) as client:
        report(client, client.retry(job_id), wait=wait, as_json=as_json)


def job_table(found: list[Job]) -> Table:
    table = Table("job", "kind", "state", "attempt", "what went wrong", title="Jobs", title_justify="left")
    for job in found:
        wrong = f"{job.error['detail']} {job.error['remedy']}".strip() if job.error else ""
        table.add_row(job.id, job.kind, job.state, str(job.attempt), wrong)
    return table
