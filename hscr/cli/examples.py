"""Examples in `--help` as they stand in the docstrings: one command in each line, to be copied."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import typer

_INDENTED = re.compile(r"(?:^    .*\n?)+", re.MULTILINE)


def keep_examples(app: typer.Typer) -> None:
    """Of all its commands, groups and theirs.

    Where indented lines end a docstring, typer takes their indentation for the docstring's own, and Markdown
    then makes one paragraph of them; between fences they stay.
    """
    for command in app.registered_commands:
        command.help = _fenced(command.callback)
    if app.registered_callback is not None:
        app.registered_callback.help = _fenced(app.registered_callback.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            keep_examples(group.typer_instance)


def _fenced(command: Callable[..., Any] | None) -> str | None:
    text = inspect.getdoc(command)
    return text and _INDENTED.sub(lambda lines: f"```\n{inspect.cleandoc(lines[0])}\n```\n", text)
