"""Statements from an event loop to PostgreSQL, without a thread between: for what every request asks.

The store is synchronous (decision 3). A thread hop, SQLAlchemy's pool and its result take several times as
long as the statement, most of it from the one interpreter that a gateway is.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Select
from sqlalchemy.dialects.postgresql.psycopg import dialect
from sqlalchemy.exc import DBAPIError

from hscr.store.database import Database, answering, spoken_to
from hscr.store.disk import disk_errors
from hscr.store.tables import UtcDateTime, with_zone

if TYPE_CHECKING:  # imported where a URL names PostgreSQL
    from psycopg import AsyncConnection
    from psycopg.rows import DictRow


_DIALECT = dialect()  # type: ignore[no-untyped-call]


class Line:
    """One connection, made when it is first needed, and anew when its server has ended it.

    Every statement is a transaction by itself. One at a time: whoever has several takes turns.
    """

    def __init__(self, database: Database) -> None:
        self._arguments = database.driver_arguments
        self._connection: AsyncConnection[DictRow] | None = None

    async def __call__(self, query: Select[*tuple[Any, ...]], **parameters: Any) -> list[dict[str, Any]]:
        """The rows. A query is translated at its first use.

        Raises DatabaseUnavailable, StoreFull, StoreReadOnly.
        """
        import psycopg  # noqa: PLC0415

        statement = _translated(query)
        with answering(), disk_errors():
            try:
                connection = await self._connected()
                cursor = await connection.execute(statement.text, {**statement.fixed, **parameters})
                rows = await cursor.fetchall()
            except psycopg.Error as error:
                raise DBAPIError.instance(None, None, error, psycopg.Error, dialect=_DIALECT) from error
        return [{**row, **{name: with_zone(row[name]) for name in statement.moments}} for row in rows]

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def _connected(self) -> "AsyncConnection[DictRow]":
        if self._connection is not None and not (self._connection.closed or spoken_to(self._connection)):
            return self._connection
        from psycopg import AsyncConnection  # noqa: PLC0415
        from psycopg.rows import dict_row  # noqa: PLC0415

        await self.close()
        self._connection = None
        self._connection = await AsyncConnection.connect(
            **self._arguments, autocommit=True, row_factory=dict_row
        )
        return self._connection


class _Statement(NamedTuple):
    """As the driver takes it. `fixed` are the parameters that it is always sent with."""

    text: str
    fixed: dict[str, Any]
    moments: list[str]
    """its columns that come without their zone"""


@cache
def _translated(query: Select[*tuple[Any, ...]]) -> _Statement:
    compiled = query.compile(dialect=_DIALECT)
    moments = [each.name for each in query.selected_columns if isinstance(each.type, UtcDateTime)]
    return _Statement(str(compiled), dict(compiled.params), moments)
