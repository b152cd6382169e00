import os
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from hscr.errors import Conflict
from hscr.processes import MARK, Process, choose_port, kill_marked, marked, resident_bytes
from tests.waiting import wait_until

PYTHON = sys.executable


def process(folder: Path, *command: str, mark: str = "test") -> Process:
    return Process("it", command, {**os.environ, MARK: mark}, folder / "it.log")


def test_output_is_of_the_latest_run_only(tmp_path: Path) -> None:
    it = process(tmp_path, PYTHON, "-c", "import os; print('run', os.getpid())")
    it.start()
    wait_until(lambda: it.exit_status == 0)
    first = it.output()
    wait_until(it.revive)
    wait_until(lambda: it.exit_status == 0)
    assert it.output() != first
    assert (tmp_path / "it.log").read_text() == first + it.output()


def test_a_program_that_keeps_dying_is_started_ever_more_rarely(tmp_path: Path) -> None:
    it = process(tmp_path, PYTHON, "-c", "raise SystemExit(3)")
    it.start()
    moments = [time.monotonic()]
    for _ in range(3):
        wait_until(it.revive, seconds=10)
        moments.append(time.monotonic())
    pauses = [later - earlier for earlier, later in pairwise(moments)]
    assert it.starts == 4
    assert pauses[2] > 2 * pauses[0] > 0.4


def test_what_a_dead_program_left_running_ends_before_it_starts_again(tmp_path: Path) -> None:
    leaves = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    it = process(tmp_path, PYTHON, "-c", leaves)
    it.start()
    wait_until(lambda: it.exit_status == 0)
    left = int(it.output())
    os.kill(left, 0)
    wait_until(it.revive)
    wait_until(lambda: resident_bytes(left) == 0, what="the end of what was left")
    wait_until(lambda: it.exit_status == 0)
    os.kill(int(it.output()), signal.SIGKILL)


def test_what_ignores_sigterm_is_killed_with_its_group(tmp_path: Path) -> None:
    stubborn = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    it = process(tmp_path, PYTHON, "-c", stubborn)
    it.start()
    wait_until(lambda: "up" in it.output())
    it.stop(grace=0.2)
    assert it.exit_status == -signal.SIGKILL
    assert it.pid is None


def test_children_die_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = f"""
import os, time
from pathlib import Path
from hscr.processes import Process
it = Process("it", ["sleep", "600"], dict(os.environ), Path({str(tmp_path)!r}) / "it.log")
it.start()
print(it.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([PYTHON, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    # Before it becomes `sleep` it has already tied itself to its parent.
    wait_until(lambda: Path(f"/proc/{child}/comm").read_text().strip() == "sleep")
    parent.kill()
    parent.wait()
    wait_until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text())


def test_orphans_are_found_and_killed_by_their_mark(tmp_path: Path) -> None:
    mark = f"orphans-{os.getpid()}"
    it = process(tmp_path, "bash", "-c", "setsid sleep 600 & echo $!", mark=mark)
    it.start()
    wait_until(lambda: it.exit_status == 0)
    orphan = int(it.output())
    assert marked(mark) == [orphan]
    assert kill_marked(mark) == [orphan]
    wait_until(lambda: marked(mark) == [])


def test_resident_bytes_grow_with_what_is_held() -> None:
    before = resident_bytes(os.getpid())
    held = bytearray(b"x") * 50_000_000
    assert resident_bytes(os.getpid()) - before > 0.8 * len(held)
    assert resident_bytes(2**22 + 1) == 0


def test_a_free_port_is_found_and_a_taken_one_refused() -> None:
    assert 0 < choose_port(0) < 65536
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Conflict, match="cannot be used for the engine"):
            choose_port(taken.getsockname()[1], what="the engine")
