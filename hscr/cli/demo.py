"""`hscr demo`: the whole loop once, told as it happens."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hscr.cli.common import terminable


def demo(
    *,
    home: Annotated[Path, typer.Option(help="State of the demo; emptied first.")] = Path(".hscr/demo"),
    images: Annotated[int, typer.Option(min=40, help="Images in the ward's traffic.")] = 240,
    test_images: Annotated[int, typer.Option(min=20, help="Images of the balanced test split.")] = 70,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
) -> None:
    """Ask, prefer, fine-tune, judge, swap: the product's one idea, for real, on this machine.

    Starts the stack on a free port, plays a ward with a reviewer, and ends with one line of JSON.
    """
    from hscr.demo.report import last_line
    from hscr.demo.story import Plan, tell

    shutil.rmtree(home, ignore_errors=True)
    console = Console(width=None if sys.stdout.isatty() else 110)
    with terminable():
        last_line(console, tell(Plan(home, images=images, test_images=test_images, seed=seed), console))
