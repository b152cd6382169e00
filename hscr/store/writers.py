"""What keeps concurrent writers apart, the same on both databases.

SQLite lets one writer in at a time. PostgreSQL lets all of them in, each statement seeing what was committed
before it began, so here every transaction that decides by what it reads holds what it has read:

* a row that is there, by `with_for_update()`: the pointer, a job;
* a row that may not be there yet, by its primary key: `add_once` and `put` never fail for another writer's
  row, they wait for it;
* rows that must not appear or go, by a lock that no row has: `referring` for whoever adds what belongs to a
  study or needs an image, `removing` for whoever deletes studies and images.

Locks are taken in the order job, idempotency key, `referring`, rows; so no two writers wait for each other.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Column, Connection, Table, func, select
from sqlalchemy.dialects import postgresql, sqlite

_INSERT: dict[str, Callable[[Table], Any]] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}
_REFERENCES = 0x48534352_01  # any number that nobody else locks: "HSCR", 1
_MIGRATIONS = 0x48534352_02
_KEYS = 0x48534352_03


def upsert(connection: Connection, table: Table) -> Any:
    """The dialect's INSERT, which has ON CONFLICT."""
    return _INSERT[connection.dialect.name](table)


def add_once(connection: Connection, table: Table, **values: Any) -> bool:
    """Insert unless a row with one of the table's keys is there, also if it is only about to be."""
    return bool(add_new(connection, table, next(iter(table.primary_key)), [values]))


def add_new(
    connection: Connection, table: Table, told: Column[Any], rows: Sequence[Mapping[str, Any]]
) -> set[Any]:
    """`add_once` for each row; what the column `told` has in those that were inserted."""
    if not rows:
        return set()
    return set(connection.execute(_add_new(connection.dialect.name, table, told), rows).scalars())


def put(connection: Connection, table: Table, **values: Any) -> None:
    """Insert, or replace the row with the same primary key."""
    connection.execute(_put(connection.dialect.name, table, tuple(values)), values)


@cache  # building a statement takes as long as sending it
def _add_new(dialect: str, table: Table, told: Column[Any]) -> Any:
    return _INSERT[dialect](table).on_conflict_do_nothing().returning(told)


@cache
def _put(dialect: str, table: Table, names: tuple[str, ...]) -> Any:
    query = _INSERT[dialect](table)
    replaced = {name: query.excluded[name] for name in names if not table.c[name].primary_key}
    return query.on_conflict_do_update(index_elements=list(table.primary_key), set_=replaced)


def referring(connection: Connection) -> None:
    """Until this transaction ends no study is deleted and no image expires; call before looking at either."""
    _lock(connection, func.pg_advisory_xact_lock_shared(_REFERENCES))


def removing(connection: Connection) -> None:
    """Wait for everyone who is `referring`, and let nobody begin until this transaction ends."""
    _lock(connection, func.pg_advisory_xact_lock(_REFERENCES))


def migrating(connection: Connection) -> None:
    """Wait until no other process migrates."""
    _lock(connection, func.pg_advisory_xact_lock(_MIGRATIONS))


def ensuring(connection: Connection) -> None:
    """Wait until no other process decides by which API keys there are."""
    _lock(connection, func.pg_advisory_xact_lock(_KEYS))


def _lock(connection: Connection, lock: Any) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(select(lock))
