"""The `hscr` command: its groups, and how an error reaches a person."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from hscr import __version__
from hscr.cli.ablate import ablate, recipes
from hscr.cli.admin import db, keys
from hscr.cli.ask import ask, caption, dependence
from hscr.cli.common import complaints
from hscr.cli.convert import convert
from hscr.cli.demo import demo
from hscr.cli.doctor import doctor
from hscr.cli.examples import keep_examples
from hscr.cli.jobs import jobs
from hscr.cli.keeping import store, studies
from hscr.cli.learn import evaluate, export, finetune, generate
from hscr.cli.phantom import phantom
from hscr.cli.release import canary, promote, rollback, status
from hscr.cli.up import up
from hscr.errors import DependencyMissing, HscrError

app = typer.Typer(
    name="hscr",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_ONLY_WITH_A_MODEL = {"torch", "transformers", "peft", "accelerate", "safetensors", "pyarrow", "matplotlib"}
_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "On this machine": (demo, up, doctor, convert),
    "Asking": (ask, caption, dependence),
    "Learning": (generate, finetune, evaluate, export, ablate, recipes),
    "Releasing": (status, promote, canary, rollback),
}
for panel, commands in _PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(jobs, name="jobs", rich_help_panel="Learning")
app.add_typer(keys, name="keys", rich_help_panel="On this machine")
app.add_typer(db, name="db", rich_help_panel="On this machine")
app.add_typer(store, name="store", rich_help_panel="On this machine")
app.add_typer(studies, name="studies", rich_help_panel="Learning")
app.add_typer(phantom, name="phantom", rich_help_panel="On this machine")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hscr {__version__}")
        raise typer.Exit


@app.callback()
def _hscr(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and stop.")
    ] = False,
) -> None:
    """Preference alignment for medical vision-language models. For research use only.

    The loop, by hand:

        hscr up                                      start everything on this machine
        hscr phantom sample                          draw images to ask about
        hscr ask samples/00.png "Is there a nodule?"
        hscr generate --input samples/rows.jsonl --consent --then-finetune --wait
        hscr status                                  what serves, what the gate said
        hscr promote VERSION --reason "..."
    """


keep_examples(app)


def main() -> None:
    """Exit 0 when it worked, 1 when a check failed, 2 for an error, 130 for Ctrl-C."""
    try:
        app()
    except HscrError as error:
        _complain(error)
        sys.exit(2)
    except OSError as error:
        _complain(
            HscrError(
                f"{error.filename}: {error.strerror}." if error.filename else f"{error}.",
                remedy="Check the path, the space left there and who may write.",
            )
        )
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in _ONLY_WITH_A_MODEL:
            raise
        _complain(
            DependencyMissing(
                f"This command needs the package {error.name}, which is not installed here.",
                remedy="`pip install 'hscr[worker]'`; among the container images, the worker has it.",
            )
        )
        sys.exit(2)


def _complain(error: HscrError) -> None:
    title = "" if type(error) is HscrError else f"{error.title}. "
    complaints.print(title + error.detail, style="bold", markup=False, highlight=False, soft_wrap=True)
    if error.remedy:
        complaints.print("→ " + error.remedy.strip(), markup=False, highlight=False, soft_wrap=True)
