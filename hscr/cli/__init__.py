"""The `hscr` command, one file per group of commands."""

from hscr.cli.app import main

__all__ = ["main"]
