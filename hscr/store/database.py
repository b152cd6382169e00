"""The connection to the database: transactions, the revision check, and nothing of the tables' meaning.

SQLite runs in WAL mode on a local disk; a writer takes its lock at BEGIN, so that it waits there (busy
timeout) instead of failing at its first write. PostgreSQL writes by READ COMMITTED, with the locks of
`hscr/store/writers.py`. On both a reader sees one state of everything, however many queries it makes.
"""

import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection as SqliteConnection
from typing import Any

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from hscr.errors import DatabaseUnavailable, SchemaOutdated, StoreError
from hscr.store.disk import disk_errors

BUSY_TIMEOUT_MS = 15_000
WRITE = "hscr_write"
_POOL: dict[str, Any] = {"pool_size": 15, "max_overflow": 0}  # an overflow would be connected anew each time
_DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_POSTGRES: dict[str, Any] = {
    "connect_timeout": 5,
    "application_name": "hscr",
    # A server that vanished is noticed, and a process stopped inside a transaction does not stop the others.
    "tcp_user_timeout": BUSY_TIMEOUT_MS,
    "options": " ".join(
        f"-c {name}={milliseconds}"
        for name, milliseconds in {
            "lock_timeout": BUSY_TIMEOUT_MS,
            "idle_in_transaction_session_timeout": 4 * BUSY_TIMEOUT_MS,
        }.items()
    ),
}


class Database:
    """One pool of connections. `read()`, `look()` and `write()` are the only ways in."""

    def __init__(self, url: str) -> None:
        """Raises StoreError for what is no URL of a database this store speaks to."""
        self.url = database_url(url)
        if not self.speaks_postgresql:
            self._engine = self._reader = self._looker = create_engine(self.url, **_POOL)
            _prepare_sqlite(self._engine, self.url)
        else:
            self._engine = create_engine(self.url, **_POOL, connect_args=_POSTGRES)
            _prepare_postgresql(self._engine)
            self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ")
            self._looker = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One state of the database for all queries of the block. Raises DatabaseUnavailable."""
        with answering(), self._reader.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def look(self) -> Iterator[Connection]:
        """For one query, which needs no BEGIN and COMMIT around it. Raises DatabaseUnavailable."""
        with answering(), self._looker.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction: committed at the end, rolled back on any exception. No I/O inside.

        Raises DatabaseUnavailable, StoreFull, StoreReadOnly.
        """
        with answering(), self._engine.connect() as connection:
            writer = connection.execution_options(**{WRITE: True})
            with disk_errors(), writer.begin():
                yield writer

    @property
    def speaks_postgresql(self) -> bool:
        return self.url.get_backend_name() == "postgresql"

    @property
    def driver_arguments(self) -> dict[str, Any]:
        """What PostgreSQL's driver connects by."""
        _, named = self._engine.dialect.create_connect_args(self.url)
        return {**named, **_POSTGRES}

    @property
    def folders(self) -> list[Path]:
        """Where the rows are, as far as that is on this machine."""
        local = not self.speaks_postgresql and self.url.database
        return [Path(local).parent] if local else []

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
        """Migrate. Only `hscr db upgrade` calls this. Raises DatabaseUnavailable."""
        with answering():
            command.upgrade(self._alembic(), revision)

    def downgrade(self, revision: str) -> None:
        with answering():
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


def database_url(url: str) -> URL:
    """The URL with the driver this store uses; it prints without its password.

    Raises StoreError for what is no URL, or one of another kind of database.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    backend = parsed.get_backend_name() if parsed else None
    if parsed is None or backend not in _DRIVERS:
        raise StoreError(
            f"HSCR_DATABASE_URL names {'no kind of database' if backend is None else backend}.",
            remedy="Use `postgresql://USER@HOST/NAME`, or `sqlite:///PATH` for one machine.",
        )
    return parsed.set(drivername=_DRIVERS[backend])


@contextmanager
def answering() -> Iterator[None]:
    """The many ways in which a database is away, or locked for too long, are one error to our callers.

    Raises DatabaseUnavailable.
    """
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        # The driver's message may name a host or quote a statement; its class says as much.
        kind = type(error.orig if isinstance(error, DBAPIError) else error).__name__
        if "certificate" in str(error):
            raise DatabaseUnavailable(
                f"The database's TLS certificate was not accepted ({kind}).",
                remedy="In HSCR_DATABASE_URL, `sslrootcert` must name a readable file with the CA that "
                "signed it, and the host must be one that it names.",
            ) from error
        raise DatabaseUnavailable(
            f"The database did not answer ({kind}).",
            remedy="Try again; if it lasts, check HSCR_DATABASE_URL and that the server runs: `hscr doctor`.",
        ) from error


def spoken_to(idle: Any) -> bool:
    """Whether there is something to read: the server's goodbye, or the kernel's for a dead connection."""
    poll = select.poll()
    poll.register(idle.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _prepare_postgresql(engine: Engine) -> None:
    """A connection that its server closed is replaced when it leaves the pool, with all others made before.

    Asking the server each time instead (`pool_pre_ping`) would be a round trip for every transaction.
    """

    @event.listens_for(engine, "checkout")
    def _on_checkout(connection: Any, _record: Any, _proxy: Any) -> None:
        try:
            if spoken_to(connection):
                engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error


def _prepare_sqlite(engine: Engine, url: URL) -> None:
    path = url.database
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
        writing = connection.get_execution_options().get(WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
