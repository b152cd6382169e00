"""`hscr doctor`: is this machine fit, and is what runs on it well?"""

import os
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from hscr.cli.common import HOME, URL, AsJson, Home, Url, console, print_json

if TYPE_CHECKING:
    from hscr.doctor import Check

_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "wrong": "[bold red]wrong[/]"}


def doctor(*, home: Home = HOME, url: Url = URL, as_json: AsJson = False) -> None:
    """Say in plain words what is missing or wrong, and how to fix it. Exit code 1 if something is wrong.

    Example:

        hscr doctor
    """
    from hscr.doctor import Status, examine  # database drivers take a second to import

    checks = examine(home, url, os.environ)
    if as_json:
        print_json([check._asdict() for check in checks])
    else:
        console.print(_table(checks))
    wrong = [check for check in checks if check.status is Status.WRONG]
    if wrong:
        raise typer.Exit(1)


def _table(checks: "list[Check]") -> Table:
    table = Table("", "what", "found", "what to do")
    for check in checks:
        table.add_row(_MARKS[check.status], check.name, check.found, check.fix)
    return table
