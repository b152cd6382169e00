"""New jobs by one statement of PostgreSQL, which is one round trip and a transaction by itself.

`Jobs.submit_all` does the same on any database: BEGIN, a statement for each table, COMMIT, six round trips.
"""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Integer,
    Select,
    String,
    Table,
    Text,
    bindparam,
    cast,
    column,
    func,
    insert,
    literal,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.types import TypeEngine

from hscr.store.jobs import FIELDS, Asked
from hscr.store.keys import Claim, check_length
from hscr.store.tables import idempotency_keys, job_events, jobs, outbox, without_zone

_DOCUMENTS = {each.name for each in FIELDS if isinstance(each.type, JSON)}


def told(asked: Sequence[Asked]) -> str:
    """What `SUBMIT` reads, as JSON.

    What is JSON itself goes as a text: PostgreSQL keeps any, but would not read an escaped NUL in it.
    Raises Conflict for an idempotency key that is too long.
    """
    rows = []
    for place, each in enumerate(asked):
        row: dict[str, Any] = {**each.job.model_dump(), "place": place}
        row |= {name: json.dumps(row[name]) for name in _DOCUMENTS if row[name] is not None}
        if each.claim is not None:
            check_length(each.claim.key)
            row |= each.claim._asdict()
        rows.append(row)
    return json.dumps(rows, default=lambda moment: without_zone(moment).isoformat())


def _submit() -> Select[str]:
    """Returns the ids of the jobs it made: those whose idempotency key is new, and those without one.

    Its parts see the database as it was before, and of each other only what they return. Keys are claimed in
    their order, so that two writers with the same ones do not wait for each other.
    """
    fields = [column(each.name, _read_as(each)) for each in FIELDS]
    claim = [column(name, Text) for name in Claim._fields]
    records = func.json_to_recordset(cast(bindparam("asked", type_=Text), JSON))
    rows = records.table_valued(*fields, *claim, column("place", Integer)).render_derived(with_types=True)
    asked = select(rows).cte("asked")
    claimed = (
        upsert(idempotency_keys)
        .from_select(
            [*Claim._fields, "created_at"],
            select(*(asked.c[name] for name in (*Claim._fields, "created_at")))
            .where(asked.c.key.is_not(None))
            .order_by(asked.c.owner, asked.c.key),
        )
        .on_conflict_do_nothing()
        .returning(idempotency_keys.c.resource)
        .cte("claimed")
    )
    keyless = asked.c.key.is_(None)
    new = select(asked).where(or_(keyless, asked.c.id.in_(select(claimed.c.resource)))).cte("new")
    job = {each.name: _kept_as(each, new.c[each.name]) for each in FIELDS}
    first = {"type": literal("state"), "data": func.json_build_object("state", job["state"])}
    of_job = {"job_id": job["id"], "created_at": job["created_at"]}
    values: dict[Table, dict[str, Any]] = {
        jobs: {**job, "last_event": literal(1)},
        outbox: {**of_job, "kind": job["kind"]},
        job_events: {**of_job, "seq": literal(1), **first},
    }
    made = [
        insert(table)
        .from_select(list(row), select(*row.values()).order_by(new.c.place))
        .cte(f"new_{table.name}")
        for table, row in values.items()
    ]
    return select(new.c.id).add_cte(*made)


def _read_as(kept: Column[Any]) -> TypeEngine[Any]:
    """A cast to VARCHAR(80) would cut what is longer; the column itself refuses it."""
    return Text() if isinstance(kept.type, String | JSON) else kept.type


def _kept_as(kept: Column[Any], read: ColumnElement[Any]) -> ColumnElement[Any]:
    return cast(read, JSON) if kept.name in _DOCUMENTS else read


SUBMIT = _submit()
