"""The `hscr` command and the stack as a person has them: real processes."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A suite that runs in the background ignores SIGINT, and so would all that it starts.
_HEARS_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
HSCR = [sys.executable, "-c", f"{_HEARS_CTRL_C}; from hscr.cli import main; main()"]


def clean_environment(**more: str) -> dict[str, str]:
    """This process's, without what a developer may have set."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HSCR_")} | more


def hscr(
    *arguments: str, seconds: float = 60, given: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`given` is its standard input."""
    return subprocess.run(
        [*HSCR, *arguments],
        input=given,
        env=clean_environment(COLUMNS="200", **environment),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def token_of(pid: int) -> str:
    """The mark that a process of a stack hands down to all its descendants."""
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next(pair.partition("=")[2] for pair in pairs if pair.startswith("HSCR_STACK="))


@dataclass
class Up:
    """A running `hscr up`; `at` is what it printed when everything was ready."""

    process: subprocess.Popen[str]
    home: Path
    at: dict[str, Any]

    @classmethod
    def start(cls, home: Path, *options: str, **environment: str) -> "Up":
        process = subprocess.Popen(
            [*HSCR, "up", "--home", str(home), "--port", "0", "--json", *options],
            env=clean_environment(**environment),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"hscr up ended with {process.wait()}"
        return cls(process, home, json.loads(line))

    def pids(self) -> dict[str, int]:
        """Of the processes as they are now."""
        return json.loads((self.home / "stack.json").read_text())["processes"]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return hscr(*arguments, HSCR_URL=self.at["url"], HSCR_HOME=str(self.home))

    def json(self, *arguments: str) -> Any:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(180)
