"""The connection to the database: transactions, the revision check, and nothing of the tables' meaning.

SQLite runs in WAL mode on a local disk; a writer takes its lock at BEGIN, so that it waits there (busy
timeout) instead of failing at its first write. PostgreSQL needs none of this.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection as SqliteConnection
from typing import Any

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from hscr.errors import SchemaOutdated, StoreError
from hscr.store.disk import disk_errors

BUSY_TIMEOUT_MS = 15_000
_WRITE = "hscr_write"


class Database:
    """One pool of connections. `read()` and `write()` are the only ways in."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        if url.startswith("sqlite"):
            _prepare_sqlite(self._engine, url)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._connection() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction: committed at the end, rolled back on any exception. No I/O inside."""
        with self._connection() as connection:
            writer = connection.execution_options(**{_WRITE: True})
            with disk_errors(), writer.begin():
                yield writer

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        try:
            connection = self._engine.connect()
        except SQLAlchemyError as error:
            raise StoreError(
                f"The database cannot be opened ({type(error).__name__}).",
                remedy="Check HSCR_DATABASE_URL and that the server runs; `hscr doctor` looks for you.",
            ) from error
        with connection:
            yield connection

    def close(self) -> None:
        self._engine.dispose()

    def revision(self) -> str | None:
        with self.read() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    def check_revision(self) -> None:
        """Raises SchemaOutdated when the tables are not those this code was written for."""
        present, wanted = self.revision(), head_revision()
        if present != wanted:
            raise SchemaOutdated(
                f"The database has revision {present or 'none'}, this code needs {wanted}.",
                remedy="Run `hscr db upgrade`.",
            )

    def upgrade(self, revision: str = "head") -> None:
        """Migrate. Only `hscr db upgrade` calls this."""
        command.upgrade(self._alembic(), revision)

    def downgrade(self, revision: str) -> None:
        command.downgrade(self._alembic(), revision)

    def _alembic(self) -> AlembicConfig:
        config = alembic_config()
        config.attributes["engine"] = self._engine
        return config


def alembic_config() -> AlembicConfig:
    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def head_revision() -> str | None:
    return ScriptDirectory.from_config(alembic_config()).get_current_head()


def _prepare_sqlite(engine: Engine, url: str) -> None:
    path = make_url(url).database
    if path and path != ":memory:":
        Path(path).parent.mkdir(parents=True, exist_ok=True)

    @event.listens_for(engine, "connect")
    def _on_connect(connection: SqliteConnection, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get(_WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
