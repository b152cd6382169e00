"""Forgetting a study: what goes, what stays as a tombstone, and which adapters only a new training changes.

Gone are its images, judgements, preference sources and records, visual dependence, and what an adapter's
probe quotes of it; its jobs are cancelled. An answer's row stays, for its provenance, without any text.
"""

from typing import Any

from sqlalchemy import Connection, Select, Table, delete, select, update

from hscr.errors import NotFound
from hscr.records import AdapterVersion, JobKind, JobState, Tombstone
from hscr.store.tables import (
    adapter_records,
    adapters,
    answer_dependence,
    answers,
    feedback,
    images,
    jobs,
    preference_sources,
    preferences,
    skipped_sources,
    tombstones,
)

_ERASED = ""


def forget(connection: Connection, study: str) -> list[str]:
    """Drop all that was derived from a study. Returns the digests of images that no study holds any more."""
    _erase_answers(connection, study)
    sources = _of(preference_sources, study, "id")
    connection.execute(delete(skipped_sources).where(skipped_sources.c.source.in_(sources)))
    for table in (preferences, preference_sources, answer_dependence):
        connection.execute(delete(table).where(table.c.study == study))
    held = delete(images).where(images.c.study == study).returning(images.c.digest)
    dropped = set(connection.execute(held).scalars())
    kept = set(connection.execute(select(images.c.digest).where(images.c.digest.in_(dropped))).scalars())
    _erase_probes(connection, trained_on(connection, study), dropped - kept)
    return sorted(dropped - kept)


def trained_on(connection: Connection, study: str) -> list[str]:
    """The adapters that were trained on a study, by name."""
    query = select(adapter_records.c.adapter).where(adapter_records.c.study == study).distinct()
    return sorted(connection.execute(query).scalars())


def unfinished_scores(connection: Connection, study: str) -> list[str]:
    """Ids of the jobs under way that look at an answer of a study."""
    mine = set(connection.execute(_of(answers, study, "id")).scalars())
    query = select(jobs.c.id, jobs.c.payload).where(
        jobs.c.kind == JobKind.SCORE_ANSWER, jobs.c.state.in_([JobState.QUEUED, JobState.RUNNING])
    )
    return [row.id for row in connection.execute(query) if row.payload.get("answer_id") in mine]


def tombstone(connection: Connection, study: str) -> Tombstone:
    """Who deleted a study, when, and every adapter trained on it. Raises NotFound."""
    row = connection.execute(select(tombstones).where(tombstones.c.study == study)).mappings().first()
    if row is None:
        raise NotFound("No study of this name was deleted.", remedy="DELETE /v1/studies/{study} deletes one.")
    known = {*row["adapters"], *trained_on(connection, study)}
    return Tombstone(
        study=study, actor=row["actor"], created_at=row["created_at"], adapters=tuple(sorted(known))
    )


def _of(table: Table, study: str, column: str) -> Select[Any]:
    return select(table.c[column]).where(table.c.study == study)


def _erase_answers(connection: Connection, study: str) -> None:
    mine = _of(answers, study, "id")
    connection.execute(delete(feedback).where(feedback.c.answer_id.in_(mine)))
    for row in connection.execute(select(answers.c.id, answers.c.body).where(answers.c.study == study)).all():
        body = row.body | {"question": _ERASED, "text": _ERASED}
        connection.execute(update(answers).where(answers.c.id == row.id).values(body=body))


def _erase_probes(connection: Connection, names: list[str], gone: set[str]) -> None:
    """A probe quotes up to four training questions; without their images it has no use for them."""
    for body in connection.execute(select(adapters.c.body).where(adapters.c.name.in_(names))).scalars().all():
        version = AdapterVersion.model_validate(body)
        items = version.probe.get("items", [])
        left = [item for item in items if item["image_digest"] not in gone]
        if left != items:
            erased = version.but(probe=version.probe | {"items": left})
            values = {"body": erased.model_dump(mode="json")}
            connection.execute(update(adapters).where(adapters.c.name == version.name).values(**values))
