"""`hscr promote`, `canary`, `rollback`, `status`: which version serves, and how everything stands."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from hscr.cli.common import URL, AsJson, Key, Url, console, print_json
from hscr.cli.follow import report
from hscr.cli.jobs import job_table
from hscr.client import Client
from hscr.errors import InvalidInput
from hscr.records import AdapterVersion, Evaluation, Pointer, Record

Reason = Annotated[str, typer.Option(help="Why; it stays on record.", prompt=True)]


def promote(
    version: Annotated[str, typer.Argument(help="As `hscr status` shows it.", show_default=False)],
    *,
    reason: Reason,
    override: Annotated[
        bool, typer.Option("--override", help="Although its gate did not pass; on your record.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it serves.")] = True,
    url: Url = URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let a version serve. Every replica loads and probes it first; no request fails because of the swap.

    Examples:

        hscr promote hscr@3f9c2a7b1d4e --reason "passed on the test split"
        hscr promote hscr@3f9c2a7b1d4e --override --reason "trial on ward 3"
    """
    with Client(url, key) as client:
        job = client.promote(version, reason=reason, override=override)
        report(client, job, wait=wait, as_json=as_json)


def canary(
    version: Annotated[
        str | None, typer.Argument(help="As `hscr status` shows it; none with --end.", show_default=False)
    ] = None,
    *,
    reason: Reason,
    share: Annotated[float, typer.Option(help="Of the traffic, between 0 and 1.")] = 0.1,
    end: Annotated[bool, typer.Option("--end", help="All traffic to the active version again.")] = False,
    override: Annotated[
        bool, typer.Option("--override", help="Although its gate did not pass; on your record.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it answers its share.")] = True,
    url: Url = URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let a version answer a share of the traffic first. If it does worse, it loses the share by itself.

    Examples:

        hscr canary hscr@3f9c2a7b1d4e --share 0.1 --reason "passed on the test split"
        hscr canary --end --reason "seen enough"
    """
    if end == (version is not None):
        raise InvalidInput("Name a version, or give --end.", remedy="`hscr status` shows the versions.")
    with Client(url, key) as client:
        if version is not None:
            job = client.canary(version, share, reason=reason, override=override)
            report(client, job, wait=wait, as_json=as_json)
            return
        pointer = client.end_canary(reason=reason)
    if as_json:
        print_json(pointer.model_dump(mode="json"))
        return
    console.print(f"{_name(pointer.active)} answers everything again.")


def rollback(*, reason: Reason, url: Url = URL, key: Key = None, as_json: AsJson = False) -> None:
    """Go back to the previous version, at once: it is still loaded.

    Example:

        hscr rollback --reason "too many false nodules"
    """
    with Client(url, key) as client:
        pointer = client.rollback(reason=reason)
    if as_json:
        print_json(pointer.model_dump(mode="json"))
        return
    console.print(f"{_name(pointer.active)} serves again; before: {_name(pointer.previous)}.")


def status(*, url: Url = URL, key: Key = None, as_json: AsJson = False) -> None:
    """Show what serves, who has it loaded, the latest jobs and evaluations.

    Example:

        hscr status --json
    """
    with Client(url, key) as client:
        pointer, adapters, canary_counts = client.pointer(), client.adapters(), client.canary_counts()
        models, jobs, evaluations = client.models(), client.jobs(limit=10), client.evaluations()[:3]
    if as_json:
        records: dict[str, Sequence[Record]] = {
            "adapters": adapters,
            "jobs": jobs,
            "evaluations": evaluations,
        }
        listed = {name: [each.model_dump(mode="json") for each in some] for name, some in records.items()}
        canary = {version: counts.model_dump() for version, counts in canary_counts.items()}
        print_json({"pointer": pointer.model_dump(mode="json"), "models": models, "canary": canary, **listed})
        return
    console.print(_serving(pointer, models))
    for version, counts in canary_counts.items():
        rate, mean = f"{counts.error_rate:.1%} failed", f"first text after {counts.mean_seconds:.2f} s"
        console.print(f"    canary: {version} answered {counts.requests} requests, {rate}, {mean}")
    if adapters:
        console.print(_adapters(adapters, evaluations))
    if jobs:
        console.print(job_table(jobs))
    if evaluations:
        _show_evaluation(evaluations[0])


def _serving(pointer: Pointer, models: list[dict[str, Any]]) -> Table:
    table = Table(
        "version", "role", "replicas", title=f"Serving, epoch {pointer.epoch}", title_justify="left"
    )
    for model in models:
        roles = [role for role in ("active", "previous", "candidate") if model[role]]
        if model["candidate"] and pointer.share:
            roles.append(f"{pointer.share:.0%} of the traffic")
        table.add_row(model["id"], ", ".join(roles), str(model["replicas"]))
    return table


def _adapters(adapters: list[AdapterVersion], evaluations: list[Evaluation]) -> Table:
    verdicts = {each.candidate: each.verdict for each in reversed(evaluations)}
    table = Table("adapter", "records", "state", "latest verdict", title="Trained", title_justify="left")
    for adapter in adapters[:10]:
        table.add_row(adapter.name, str(adapter.records), adapter.state, verdicts.get(adapter.name, ""))
    return table


def _show_evaluation(latest: Evaluation) -> None:
    console.print(
        f"Last evaluation: {_name(latest.candidate)} against {_name(latest.active)}, "
        f"{latest.questions} questions on {latest.images} images: [bold]{latest.verdict}[/]"
    )
    for reason in latest.reasons:
        console.print(f"    {reason}", markup=False)


def _name(version: str | None) -> str:
    return version or "the base model"
