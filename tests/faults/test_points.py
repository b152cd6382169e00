"""Points are named in the source and nowhere armed by accident."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hscr.doctor import Status
from hscr.faults import BUILD, FOLDER, REACHED, armed
from tests.cli.test_doctor import check
from tests.faults.points import ROOT, BadPoint, calls, documented, points

DIES = (
    "from hscr.faults import fault_point; fault_point('here'); fault_point('of', 'release'); print('lived')"
)


def ended(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, FOLDER: str(folder), BUILD: "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", DIES], env=given, capture_output=True, text=True, check=False
    )


def test_a_process_dies_at_an_armed_point_once_and_says_at_its_start_that_it_may(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("SIGKILL\n")
    (tmp_path / "of.release").write_text("SIGKILL\n")
    first, second, third = (ended(tmp_path) for _ in range(3))
    assert [each.returncode for each in (first, second, third)] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert third.stdout == "lived\n"
    assert "TEST BUILD" in first.stderr
    pid, _, command = (tmp_path / f"here{REACHED}").read_text().partition(" ")
    assert pid.isdigit()
    assert sys.executable in command


def test_one_variable_alone_arms_nothing(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("SIGKILL")
    done = ended(tmp_path, **{BUILD: ""})
    assert (done.returncode, done.stdout) == (0, "lived\n")
    assert "ignored" in done.stderr
    assert armed({BUILD: "1"}) is None
    assert armed({FOLDER: "x", BUILD: "yes"}) is None


def test_an_installed_package_cannot_be_armed(tmp_path: Path) -> None:
    """It has no tests beside it."""
    package = tmp_path / "hscr"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "faults.py").write_text((ROOT / "hscr" / "faults.py").read_text())
    (tmp_path / "here").write_text("SIGKILL")
    given = {**os.environ, FOLDER: str(tmp_path), BUILD: "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", DIES]
    done = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "lived\n"), done.stderr


def test_the_doctor_tells(tmp_path: Path) -> None:
    given = {FOLDER: str(tmp_path)}
    assert check("Fault points", tmp_path).status is Status.OK
    assert check("Fault points", tmp_path, **given).status is Status.NOTE
    assert check("Fault points", tmp_path, **given, **{BUILD: "1"}).status is Status.WRONG


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("fault_point(name)", "literal"),
        ("fault_point(f'a.{b}')", "literal"),
        ("faults.fault_point()", "literal"),
        ("partial(fault_point, 'a.b')", "nothing else"),
        ("fault_point('a.b'); fault_point('a.b')", "once"),
    ],
)
def test_a_point_that_cannot_be_collected_is_an_error(tmp_path: Path, source: str, problem: str) -> None:
    (tmp_path / "hscr").mkdir()
    (tmp_path / "hscr" / "module.py").write_text(source)
    with pytest.raises(BadPoint, match=problem):
        points(tmp_path)


def test_a_new_point_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "new.py").write_text("def f():\n    faults.fault_point('new.one')\n")
    assert points(tmp_path) == ["new.one"]


def test_the_page_lists_the_points_that_there_are() -> None:
    assert sorted(documented()) == sorted(call.name for call in calls())
