"""Programs as supervised processes of one machine: started, watched, logged, stopped, none left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hscr import tether
from hscr.errors import Conflict

MARK = "HSCR_STACK"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0


class Process:
    """One program in its own session, its output appended to `log`.

    It dies with the *thread* that starts it, so one long-lived thread must start, watch and stop it.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.starts = 0
        self._command = list(command)
        self._environment = dict(environment)
        self._popen: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._due = 0.0

    @property
    def pid(self) -> int | None:
        """None while it is not running."""
        return self._popen.pid if self._popen is not None and self._popen.poll() is None else None

    @property
    def exit_status(self) -> int | None:
        """Of the latest run; negative for a signal; None while it runs or before it ran."""
        return None if self._popen is None else self._popen.poll()

    def start(self) -> None:
        """Run the command. Each start at once after another doubles the pause before the next one."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        tethered = [sys.executable, "-S", tether.__file__, str(os.getpid()), *self._command]
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._popen = subprocess.Popen(
                tethered,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        pause = min(_FIRST_PAUSE * 2**self.starts, _LONGEST_PAUSE)
        self._due = time.monotonic() + pause
        self.starts += 1

    def revive(self) -> bool:
        """Start it again if it died and its pause is over, and end what it left. Returns whether it did."""
        if self._popen is None or self.pid is not None or time.monotonic() < self._due:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self.start()
        return True

    def stop(self, grace: float) -> None:
        """SIGTERM, then SIGKILL to its whole group after `grace` seconds."""
        self.terminate()
        self.wait(grace)

    def terminate(self) -> None:
        """SIGTERM, once: a second one asks for a forced end."""
        if self._popen is not None and self._popen.poll() is None:
            self._popen.terminate()

    def wait(self, grace: float) -> None:
        """Until it has ended; after `grace` seconds SIGKILL to its whole group."""
        if self._popen is None:
            return
        try:
            self._popen.wait(grace)
        except subprocess.TimeoutExpired:
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()

    def output(self) -> str:
        """What the latest run has written."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.output().splitlines()[-lines:])


def marked(token: str) -> list[int]:
    """Processes that inherited `HSCR_STACK=token`, by id: also those whose parent died and left them."""
    wanted = f"{MARK}={token}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or belongs to somebody else
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return sorted(found)


def kill_marked(token: str) -> list[int]:
    """End what outlived its own parent. Returns the ids it had to kill."""
    left = marked(token)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def resident_bytes(pid: int) -> int:
    """Resident set size; 0 for a process that is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def choose_port(port: int, host: str = "127.0.0.1", *, what: str = "this") -> int:
    """`port` if it is free, any free one for 0. Raises Conflict when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Conflict(
                f"Port {port} on {host} cannot be used for {what}: {error.strerror}.",
                remedy=f"Stop what listens there (`ss -ltnp sport = :{port}` shows it) or choose another.",
            ) from error
        return int(probe.getsockname()[1])
