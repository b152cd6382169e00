"""Revisions, connections, transactions, keys and blobs."""

import traceback
from pathlib import Path

import pytest

from hscr.errors import NotFound, SchemaOutdated, StoreError
from hscr.records import Role
from hscr.store.database import Database
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from tests.postgres_server import PostgresServer


def test_a_database_without_tables_is_refused_with_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(SchemaOutdated, match="hscr db upgrade"):
        Store.open(StoreSettings(home=tmp_path))


def test_an_unreachable_database_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((StoreError, OSError)):
        Database(f"sqlite:///{tmp_path}/file/hscr.db").revision()


@pytest.mark.parametrize("named", ["postgresql", "postgres", "postgresql+psycopg"])
def test_an_absent_server_is_a_clear_error_without_its_password(named: str) -> None:
    database = Database(f"{named}://hscr:s3cret@127.0.0.1:1/hscr")
    with pytest.raises(StoreError) as caught:
        database.revision()
    told = "".join(traceback.format_exception(caught.value)) + f"{caught.value.remedy} {database.url}"
    assert "hscr doctor" in told
    assert "s3cret" not in told


def test_a_server_that_restarts_costs_no_caller_anything_afterwards(postgres: PostgresServer) -> None:
    database = Database(postgres.migrated())
    revision = database.revision()
    postgres.restart()
    assert database.revision() == revision
    database.close()


@pytest.mark.parametrize("url", ["mysql://u:s3cret@h/x", "no url", "postgresql:s3cret"])
def test_what_is_no_database_of_ours_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(StoreError, match="postgresql://USER@HOST/NAME") as caught:
        Database(url)
    assert "s3cret" not in str(caught.value)


def test_keys_are_hashed_at_rest_and_die_when_revoked(store: Store, tmp_path: Path) -> None:
    key, secret = store.keys.create("ward 3", Role.REVIEWER, train_consent=True)
    assert store.keys.verify(secret) == key
    store.database.close()
    assert not any(secret.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    store.keys.revoke(key.id)
    assert store.keys.verify(secret) is None
    with pytest.raises(NotFound):
        store.keys.revoke(key.id)
