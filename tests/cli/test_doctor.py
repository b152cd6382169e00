"""Each broken thing is named with its fix; nothing that is merely absent is called wrong."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hscr.doctor import Check, Status, examine
from hscr.store.database import Database
from tests.cli.running import hscr
from tests.postgres_server import PASSWORD, PostgresServer
from tests.redis_server import free_port
from tests.s3_server import S3Server

CLOSED = "127.0.0.1:9"
"""The discard port: nothing listens there."""


def check(name: str, home: Path, url: str = f"http://{CLOSED}", **environment: str) -> Check:
    return next(each for each in examine(home, url, environment) if each.name == name)


@pytest.fixture
def free_url() -> str:
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture
def silent() -> Iterator[int]:
    """A port on which something listens that is no gateway and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_fresh_machine_has_nothing_wrong(tmp_path: Path, free_url: str) -> None:
    checks = examine(tmp_path / "new", free_url, {})
    assert [each.name for each in checks if each.status is Status.WRONG] == []
    assert not (tmp_path / "new").exists(), "looking must not make anything"
    for name in ("Redis", "Engine", "Gateway", "Database"):
        found = next(each for each in checks if each.name == name)
        assert found.status is Status.NOTE
        assert "hscr up" in found.fix


def test_redis_that_does_not_answer(tmp_path: Path) -> None:
    found = check("Redis", tmp_path, HSCR_REDIS_URL=f"redis://:secret@{CLOSED}/0")
    assert found.status is Status.WRONG
    assert "Connection refused" in found.found
    assert "secret" not in found.found
    assert "HSCR_REDIS_URL" in found.fix


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://hscr:s3cret@{CLOSED}/hscr",
        f"postgres://{CLOSED}/hscr?password=s3cret",
        "mysql://a:s3cret@b/c",
    ],
)
def test_a_database_that_cannot_be_reached_is_told_without_its_password(tmp_path: Path, url: str) -> None:
    found = check("Database", tmp_path, HSCR_DATABASE_URL=url)
    assert found.status is Status.WRONG
    assert "s3cret" not in str(found)
    assert "HSCR_DATABASE_URL" in found.fix + found.found


def test_a_postgresql_of_this_revision_is_named_without_its_password(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    url = postgres.migrated()
    found = check("Database", tmp_path, HSCR_DATABASE_URL=f"{url}?application_name=s3cret")
    assert found.status is Status.OK, found
    assert url.rpartition("/")[2] in found.found
    assert PASSWORD not in found.found
    assert "s3cret" not in found.found


def test_a_database_of_another_revision(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'hscr.db'}")
    database.upgrade()
    assert check("Database", tmp_path).status is Status.OK
    database.downgrade("base")
    database.close()
    found = check("Database", tmp_path)
    assert found.status is Status.WRONG
    assert "revision none" in found.found
    assert "hscr db upgrade" in found.fix


def test_a_blob_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file where the folder should be")
    found = check("Blob folder", tmp_path)
    assert found.status is Status.WRONG
    assert "not writable" in found.found
    assert "HSCR_HOME" in found.fix


def test_an_engine_that_is_not_healthy(tmp_path: Path) -> None:
    found = check("Engine", tmp_path, HSCR_ENGINE_URL=f"http://{CLOSED}")
    assert found.status is Status.WRONG
    assert "engine.log" in found.fix


def test_a_gateway_port_taken_by_another_program(tmp_path: Path, silent: int) -> None:
    found = check("Gateway", tmp_path, f"http://127.0.0.1:{silent}")
    assert found.status is Status.WRONG
    assert f"port {silent} is taken" in found.found
    assert "--port 0" in found.fix


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    found = check("Model", tmp_path, HSCR_MODEL_PATH=str(tmp_path))
    assert found.status is Status.WRONG
    assert "HSCR_MODEL_PATH" in found.fix


def test_data_that_holds_no_datasets(tmp_path: Path) -> None:
    found = check("HSCR_DATA", tmp_path, HSCR_DATA=str(tmp_path))
    assert found.status is Status.WRONG
    (tmp_path / "test.jsonl").write_text("{}")
    assert check("HSCR_DATA", tmp_path, HSCR_DATA=str(tmp_path)).status is Status.OK


def test_a_note_of_a_killed_stack_is_not_believed(tmp_path: Path, free_url: str) -> None:
    state = {"pid": 2**22 + 1, "url": f"http://{CLOSED}", "redis_url": f"redis://{CLOSED}"}
    (tmp_path / "stack.json").write_text(json.dumps(state))
    assert check("Redis", tmp_path, free_url).status is Status.NOTE
    assert check("Gateway", tmp_path, free_url).status is Status.NOTE


def test_the_command_exits_1_when_something_is_wrong(tmp_path: Path, free_url: str) -> None:
    broken = hscr(
        "doctor", "--json", "--home", str(tmp_path), HSCR_URL=free_url, HSCR_REDIS_URL=f"redis://{CLOSED}"
    )
    assert broken.returncode == 1
    wrong = [each["name"] for each in json.loads(broken.stdout) if each["status"] == "wrong"]
    assert wrong == ["Redis"]
    assert hscr("doctor", "--home", str(tmp_path), HSCR_URL=free_url).returncode == 0


def test_an_object_store_that_takes_what_is_written_and_one_that_is_away(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.bucket().items():
        monkeypatch.setenv(f"HSCR_{name.upper()}", value)
    found = check("Object store", tmp_path, HSCR_BLOBS_URL=os.environ["HSCR_BLOBS_URL"])
    assert found.status is Status.OK, found
    monkeypatch.setenv("HSCR_S3_ENDPOINT", f"http://{CLOSED}")
    found = check("Object store", tmp_path, HSCR_BLOBS_URL=os.environ["HSCR_BLOBS_URL"])
    assert found.status is Status.WRONG
    assert "HSCR_S3_ENDPOINT" in found.fix
