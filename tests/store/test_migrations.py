"""Migrations: what they make, what they keep, and two at once."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, Boolean, Connection, DateTime, Float, Integer, MetaData, Table, insert, select

from hscr.records import now
from hscr.store.database import Database, alembic_config, head_revision
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from hscr.store.tables import metadata
from tests.postgres_server import PostgresServer

BEFORE = ScriptDirectory.from_config(alembic_config()).get_revision("head").down_revision
Rows = dict[str, list[dict[str, Any]]]

_VALUES: dict[type, Callable[[int], Any]] = {
    Boolean: bool,
    Integer: int,
    Float: float,
    JSON: lambda number: {"n": number, "text": "ü"},
    DateTime: lambda _: now(),
}


def test_the_migrations_make_exactly_the_tables_of_the_code(store: Store) -> None:
    with store.database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_migrations_go_down_and_up_again(store: Store) -> None:
    store.database.downgrade("base")
    assert store.database.revision() is None
    store.database.upgrade()
    assert store.releases.pointer().epoch == 0


def test_a_step_down_and_up_again_keeps_every_row_that_both_revisions_know(store: Store) -> None:
    database = store.database
    with database.write() as connection:
        _fill(connection)
    full = _rows(database)
    assert full.keys() == metadata.tables.keys()
    assert all(full.values())

    database.downgrade(BEFORE)
    kept = _rows(database)
    assert kept == {name: _narrowed(full[name], rows) for name, rows in kept.items()}

    database.upgrade()
    again = _rows(database)
    assert again.keys() == full.keys()
    assert {name: _narrowed(again[name], rows) for name, rows in kept.items()} == kept


def _fill(connection: Connection) -> None:
    """Two rows into every table; each refers to the rows of the same number."""
    for table in metadata.sorted_tables:
        for number in (2, 3):  # the pointer has a row already
            values = {column.name: _value(column, number) for column in table.columns}
            connection.execute(insert(table).values(**values))


def _value(column: Any, number: int) -> Any:
    kind = next((kind for kind in _VALUES if isinstance(_plain(column.type), kind)), None)
    return _VALUES[kind](number) if kind else f"value {number}"


def _plain(kind: Any) -> Any:
    return getattr(kind, "impl", kind)


def _rows(database: Database) -> Rows:
    """Everything but the revision, by the tables that are there."""
    present = MetaData()
    with database.read() as connection:
        present.reflect(connection)
        return {
            name: [dict(row) for row in connection.execute(_ordered(table)).mappings()]
            for name, table in present.tables.items()
            if name != "alembic_version"
        }


def _ordered(table: Table) -> Any:
    return select(table).order_by(*table.primary_key)


def _narrowed(rows: list[dict[str, Any]], like: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with only those columns that the others have."""
    return [{name: row[name] for name in other} for row, other in zip(rows, like, strict=True)]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_processes_may_migrate_at_once(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    settings = StoreSettings(home=tmp_path, database_url=None)
    if kind == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        settings = StoreSettings(home=tmp_path, database_url=server.empty())
    code = f"from hscr.store.database import Database; Database({settings.database!r}).upgrade()"
    upgrades = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    errors = [upgrade.communicate()[1] for upgrade in upgrades]
    assert [upgrade.returncode for upgrade in upgrades] == [0, 0, 0], errors
    database = Database(settings.database)
    assert database.revision() == head_revision()
    database.close()
