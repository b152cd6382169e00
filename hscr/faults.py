"""Fault points: named places where a test ends this process as the kernel would, to see what is left.

    fault_point("release.flip")

It costs one comparison unless two variables are set and the code runs from a source tree with its tests
beside it, which no installed package has:

    HSCR_TEST_BUILD=1        says that whoever started the process means it
    HSCR_FAULTS=FOLDER       a file FOLDER/release.flip arms that point

The file holds the name of the signal that the process sends itself: SIGKILL, or SIGSTOP to stand still.
It is renamed to `release.flip.reached` first, so that each file works once, whoever comes by, and the process
that is started again passes. A process in which points can be armed says so loudly when it starts; one that
has HSCR_FAULTS alone ignores it, and says that. `hscr doctor` reports both.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

FOLDER, BUILD = "HSCR_FAULTS", "HSCR_TEST_BUILD"
REACHED = ".reached"
_TESTS = Path(__file__).parents[1] / "tests" / "faults"


def armed(environment: Mapping[str, str]) -> Path | None:
    """The folder that arms points; None in every process that is not meant to die."""
    folder = environment.get(FOLDER)
    build = environment.get(BUILD) == "1" and _TESTS.is_dir()
    return Path(folder) if folder and build else None


def fault_point(name: str, kind: str | None = None) -> None:
    """Die here if `name` is armed. `kind`, where jobs or tasks of all kinds pass: armed as NAME.KIND.

    Names are literal and occur once; the tests collect them from the source.
    """
    if _FOLDER is not None:
        _die(_FOLDER / (f"{name}.{kind}" if kind else name))


def _die(point: Path) -> None:
    reached = point.with_name(point.name + REACHED)
    try:
        number = signal.Signals[point.read_text().strip()]
        point.rename(reached)
    except FileNotFoundError:
        return
    reached.write_text(f"{os.getpid()} {' '.join(sys.orig_argv)}")
    # To the thread: one for the process goes to its main thread, and this one would run on meanwhile.
    signal.pthread_kill(threading.get_ident(), number)


_FOLDER = armed(os.environ)
if _FOLDER is not None:
    logging.getLogger(__name__).critical(
        "TEST BUILD: this process kills itself at the points armed in %s. Never run it for real.", _FOLDER
    )
elif os.environ.get(FOLDER):
    logging.getLogger(__name__).critical("%s is set, but this is no test build: it is ignored.", FOLDER)
