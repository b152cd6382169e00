"""The command without a stack: help, keys, db, problems."""

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from pathlib import Path

import pytest
import typer
from rich.console import Console
from rich.progress import Progress
from typer.models import CommandInfo
from typer.testing import CliRunner

from hscr import __version__
from hscr.cli.app import app
from hscr.cli.here import Pace, rows_done
from hscr.records import Role
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from tests.cli.running import hscr

COMMANDS = (
    "up ask caption dependence generate finetune evaluate promote canary rollback status export doctor keys "
    "db phantom"
)


def examples(group: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Of each command: its path and the indented lines of its docstring."""
    taught = {(*path, name_of(command)): command.callback for command in group.registered_commands}
    if group.registered_callback is not None:
        taught[path] = group.registered_callback.callback
    for name, callback in taught.items():
        lines = (inspect.getdoc(callback) or "").splitlines()
        yield name, [line.strip() for line in lines if line.startswith("    ")]
    for child in group.registered_groups:
        assert child.typer_instance is not None
        yield from examples(child.typer_instance, (*path, str(child.name)))


def name_of(command: CommandInfo) -> str:
    assert command.callback is not None
    return command.name or command.callback.__name__


def leaves(group: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for command in group.registered_commands:
        yield (*path, name_of(command))
    for child in group.registered_groups:
        assert child.typer_instance is not None
        yield from leaves(child.typer_instance, (*path, str(child.name)))


def test_every_promised_command_exists() -> None:
    listed = {path[0] for path in leaves(app)}
    assert set(COMMANDS.split()) <= listed


@pytest.mark.parametrize("path", [path for path in leaves(app) if path[0] != "demo"], ids=" ".join)
def test_help_teaches(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"])
    assert shown.exit_code == 0
    if path not in {("keys", "list"), ("keys", "revoke"), ("db", "check")}:
        assert "Example" in shown.output
        assert f"hscr {' '.join(path)}" in shown.output


@pytest.mark.parametrize(("path", "lines"), [(p, x) for p, x in examples(app) if x], ids=" ".join)
def test_help_shows_examples_line_by_line(path: tuple[str, ...], lines: list[str]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    found = [line.strip() for line in shown.output.splitlines()]
    assert [line for line in found if line in lines] == lines


def test_the_version_is_the_packages() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"hscr {__version__}\n"


def test_a_package_that_only_some_images_have_is_named_with_the_way_to_it(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["pyarrow"] = None
sys.argv = ["hscr", "export", "--home", sys.argv[1], "--out", sys.argv[1] + "/out"]
from hscr.cli import main
main()
"""
    hscr("db", "upgrade", "--home", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=False, capture_output=True, text=True
    )
    problem, remedy = done.stderr.splitlines()
    assert done.returncode == 2
    assert "needs the package pyarrow" in problem
    assert "hscr[worker]" in remedy


def test_the_command_starts_without_what_takes_long_to_import() -> None:
    script = "import sys, hscr.cli; print(*{'torch', 'pyarrow', 'matplotlib', 'sqlalchemy'} & {*sys.modules})"
    started = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert started.stdout.split() == []


STACK = "--consent --then-finetune --auto-promote --wait --url http://127.0.0.1:9 --key k"
FOLDER = "--resume --limit 3 --shard-size 256 --batch-size 16 --device cpu --dtype auto --compile --adapter a"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (f"--out records {STACK}", "cannot go with --out"),
        (f"{FOLDER} --model m", "cannot go without --out"),
        ("--consent --shard-size 3", "--shard-size cannot go without --out"),
        ("--out records --wait", "--wait cannot go with --out"),
    ],
)
def test_generate_refuses_the_options_of_its_other_way(tmp_path: Path, given: str, said: str) -> None:
    done = hscr("generate", "--input", str(tmp_path), *given.split(), HSCR_MODEL_PATH="m")
    assert done.returncode == 2
    told, asked = " ".join(done.stderr.split()), given.replace("--out", "").split()
    assert said in told
    assert all(option in told for option in asked if option.startswith("--") and option != "--consent")


@pytest.mark.parametrize("before", [0, 64])
def test_pace_is_measured_over_all_that_this_process_did(before: int) -> None:
    """On a model that takes 40 s for a batch of 16, whose rows come in one burst."""
    clock = 1000.0
    bars = Progress(Pace(), get_time=lambda: clock, auto_refresh=False, console=Console(file=StringIO()))
    advance = rows_done(bars)
    clock += 300  # to load the model
    advance(before, 160)
    assert Pace().render(bars.tasks[0]).plain == ""
    for batch in range(before, 160, 16):
        clock += 40
        for row in range(batch, batch + 16):
            advance(row + 1, 160)
        left = timedelta(seconds=(144 - batch) // 16 * 40)
        assert Pace().render(bars.tasks[0]).plain == f"0.40 rows/s, {left} left"
        clock += 10
        assert (
            Pace()
            .render(bars.tasks[0])
            .plain.endswith(f"{max(timedelta(), left - timedelta(seconds=10))} left")
        )
        clock -= 10


def test_rows_that_are_not_there_make_no_folder(tmp_path: Path) -> None:
    done = hscr("generate", "--input", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "none.jsonl does not exist" in done.stderr
    assert not (tmp_path / "out").exists()


def test_rows_for_the_stack_are_refused_whole_and_by_place(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "none.png", "question": "What?", "answer": "Nothing."}\n')
    unread = hscr("generate", "--input", str(rows), "--consent", HSCR_URL="http://127.0.0.1:9")
    assert unread.returncode == 2
    assert "none.png of line 1 cannot be read: No such file" in unread.stderr
    rows.write_text('{"image": "none.png", "question": "What?"}\n')
    unusable = hscr("generate", "--input", str(rows), "--consent", HSCR_URL="http://127.0.0.1:9")
    assert "line 1 cannot be used: The answer is missing" in unusable.stderr


def test_without_a_gateway_the_remedy_is_hscr_up() -> None:
    done = hscr("status", HSCR_URL="http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("→ Start the stack with `hscr up`")
    assert "Traceback" not in done.stderr


def test_an_unreadable_image_is_named() -> None:
    done = hscr("ask", "no/such.png", "What?")
    assert done.returncode == 2
    assert "no/such.png cannot be read: No such file" in done.stderr


def test_an_unknown_key_of_a_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop.toml").write_text("[finetune]\nrang = 4\n")
    done = hscr("finetune", "--config", str(tmp_path / "loop.toml"))
    assert done.returncode == 2
    assert "finetune.rang" in done.stderr


def test_db_check_and_upgrade(tmp_path: Path) -> None:
    before = hscr("db", "check", "--home", str(tmp_path))
    assert before.returncode == 1
    assert "Run `hscr db upgrade`" in before.stdout
    assert hscr("db", "upgrade", "--home", str(tmp_path)).returncode == 0
    assert hscr("db", "check", "--home", str(tmp_path)).returncode == 0


def test_a_key_is_shown_once_works_and_stops_working(settings: StoreSettings) -> None:
    home = str(settings.home)
    made = hscr("keys", "create", "--name", "ward 3", "--role", "reviewer", "--json", HSCR_HOME=home)
    key = json.loads(made.stdout)
    with Store.open(settings) as store:
        known = store.keys.verify(key["secret"])
    assert known is not None
    assert (known.name, known.role, known.train_consent) == ("ward 3", Role.REVIEWER, False)
    listed = hscr("keys", "list", HSCR_HOME=home).stdout
    assert key["id"] in listed
    assert key["secret"] not in listed
    assert hscr("keys", "revoke", key["id"], HSCR_HOME=home).returncode == 0
    with Store.open(settings) as store:
        assert store.keys.verify(key["secret"]) is None
    again = hscr("keys", "revoke", key["id"], HSCR_HOME=home)
    assert again.returncode == 2
    assert "hscr keys list" in again.stderr


SECRET = f"hscr_sk_{'0123456789abcdef' * 4}"


def test_a_key_of_a_given_secret_is_made_once(settings: StoreSettings, tmp_path: Path) -> None:
    file = tmp_path / "first-key"
    file.write_text(f"{SECRET}\n")
    ensure = ("keys", "ensure", "--name", "first", "--role", "operator", "--json", "--secret-file")
    home = str(settings.home)
    made = json.loads(hscr(*ensure, str(file), HSCR_HOME=home).stdout)
    again = json.loads(hscr(*ensure, "-", HSCR_HOME=home, given=SECRET).stdout)
    assert (made.pop("changed"), again.pop("changed")) == (True, False)
    assert made == again
    assert SECRET not in str(made)
    with Store.open(settings) as store:
        assert store.keys.verify(SECRET) == store.keys.page()[0]

    file.write_text(SECRET.replace("0", "1"))
    other = hscr(*ensure, str(file), HSCR_HOME=home)
    assert other.returncode == 2
    assert "--replace" in other.stderr
    replaced = hscr(*ensure, str(file), "--replace", HSCR_HOME=home)
    assert json.loads(replaced.stdout)["changed"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hscr_sk_short", "openssl rand -hex 32"),
        (b"\xff\xfe", "is no text"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_without_a_secret_is_refused(content: bytes | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    hscr("db", "upgrade", "--home", str(tmp_path))
    done = hscr("keys", "ensure", "--name", "me", "--secret-file", str(file), "--home", str(tmp_path))
    assert done.returncode == 2
    assert said in done.stderr
    assert "short" not in done.stderr


def test_keys_of_a_stale_database_name_the_command_to_run(tmp_path: Path) -> None:
    done = hscr("keys", "list", "--home", str(tmp_path))
    assert done.returncode == 2
    assert "→ Run `hscr db upgrade`." in done.stderr
