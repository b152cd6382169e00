"""Preference sources and records, and their deletion by study."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, func, select

from hscr.records import PreferenceRecord, PreferenceSource, Tombstone, now
from hscr.store.database import Database
from hscr.store.deletion import forget, tombstone, trained_on, unfinished_scores
from hscr.store.jobs import cancel_in
from hscr.store.tables import preference_sources, preferences, skipped_sources, tombstones
from hscr.store.writers import add_once, put, referring, removing

_SOME = 5000
"""ids named in one statement"""


class Preferences:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add_sources(self, sources: Sequence[PreferenceSource]) -> None:
        with self._database.write() as connection:
            for source in sources:
                add_source(connection, source)

    def sources(self, ids: Sequence[str]) -> list[PreferenceSource]:
        """In the order of their ids; unknown or deleted ones are left out."""
        found = self._sources(select(preference_sources.c.body).where(preference_sources.c.id.in_(ids)))
        return sorted(found, key=lambda source: source.id)

    def pending(self, config_digest: str, *, limit: int = 100_000) -> list[PreferenceSource]:
        """Consented sources that this configuration has made nothing of yet, nor given up on."""
        made = select(preferences.c.source).where(preferences.c.config_digest == config_digest)
        skipped = select(skipped_sources.c.source).where(skipped_sources.c.config_digest == config_digest)
        return self._sources(
            select(preference_sources.c.body)
            .where(preference_sources.c.consent.is_(True))
            .where(preference_sources.c.id.not_in(made), preference_sources.c.id.not_in(skipped))
            .order_by(preference_sources.c.created_at, preference_sources.c.id)
            .limit(limit)
        )

    def count_sources_since(self, moment: datetime | None) -> int:
        query = select(func.count()).where(preference_sources.c.consent.is_(True))
        if moment is not None:
            query = query.where(preference_sources.c.created_at > moment)
        with self._database.read() as connection:
            return connection.execute(query).scalar_one()

    def live(self, *, method: str, limit: int) -> list[PreferenceRecord]:
        """The newest consented records of a method, oldest first."""
        query = (
            select(preferences.c.body)
            .where(preferences.c.consent.is_(True), preferences.c.method == method)
            .order_by(preferences.c.created_at.desc(), preferences.c.id)
            .limit(limit)
        )
        with self._database.read() as connection:
            rows = connection.execute(query).scalars().all()
        return [PreferenceRecord.model_validate(body) for body in reversed(rows)]

    def page(
        self,
        *,
        method: str | None = None,
        job_id: str | None = None,
        project: str | None = None,
        limit: int = 50,
        before: datetime | None = None,
    ) -> list[PreferenceRecord]:
        """Newest first."""
        query = select(preferences.c.body).order_by(preferences.c.created_at.desc()).limit(limit)
        if method is not None:
            query = query.where(preferences.c.method == method)
        if job_id is not None:
            query = query.where(preferences.c.job_id == job_id)
        if project is not None:
            query = query.where(preferences.c.project == project)
        if before is not None:
            query = query.where(preferences.c.created_at < before)
        with self._database.read() as connection:
            return [PreferenceRecord.model_validate(body) for body in connection.execute(query).scalars()]

    def count(self, *, job_id: str) -> int:
        """How many records a job made."""
        query = select(func.count()).where(preferences.c.job_id == job_id)
        with self._database.read() as connection:
            return connection.execute(query).scalar_one()

    def of_source(self, source_id: str) -> list[PreferenceRecord]:
        query = select(preferences.c.body).where(preferences.c.source == source_id)
        with self._database.read() as connection:
            return [PreferenceRecord.model_validate(body) for body in connection.execute(query).scalars()]

    def skipped(self, job_id: str) -> dict[str, str]:
        """Why a job made nothing of some sources: source id to reason."""
        query = select(skipped_sources).where(skipped_sources.c.job_id == job_id)
        with self._database.read() as connection:
            return {row.source: row.reason for row in connection.execute(query)}

    def delete_study(self, study: str, actor: str) -> tuple[list[str], list[str]]:
        """Tombstone a study and drop what was derived from it; a study deleted before stays so.

        Returns the adapters that were trained on it, and the image digests nothing refers to any more.
        """
        with self._database.write() as connection:
            for job_id in unfinished_scores(connection, study):  # jobs are locked before all else
                cancel_in(connection, job_id)
            removing(connection)
            adapters = trained_on(connection, study)
            unheld = forget(connection, study)
            put(connection, tombstones, study=study, actor=actor, adapters=adapters, created_at=now())
        return adapters, unheld

    def tombstone(self, study: str) -> Tombstone:
        """What is left of a deleted study. Raises NotFound."""
        with self._database.read() as connection:
            return tombstone(connection, study)

    def _sources(self, query: Select[Any]) -> list[PreferenceSource]:
        with self._database.read() as connection:
            return [PreferenceSource.model_validate(body) for body in connection.execute(query).scalars()]


def add_source(connection: Connection, source: PreferenceSource) -> None:
    """Keep a source; one that is there already stays as it is. A deleted study takes nothing new."""
    referring(connection)
    buried = select(tombstones.c.study).where(tombstones.c.study == source.study)
    if connection.execute(buried).first():
        return
    add_once(
        connection,
        preference_sources,
        id=source.id,
        study=source.study,
        project=source.project,
        consent=source.consent,
        created_at=now(),
        body=source.model_dump(mode="json"),
    )


def add_record(connection: Connection, record: PreferenceRecord) -> bool:
    """Keep a record in a worker's fenced transaction. False when it exists, or its source was deleted."""
    referring(connection)
    source = select(preference_sources.c.id).where(preference_sources.c.id == record.source)
    if not connection.execute(source).first():
        return False
    columns = {column.name for column in preferences.c} - {"body"}
    values = record.model_dump(include=columns)
    return add_once(connection, preferences, body=record.model_dump(mode="json"), **values)


def all_live(connection: Connection, records: Sequence[PreferenceRecord]) -> bool:
    """Whether none of the records was deleted, nor will be until this transaction ends."""
    referring(connection)
    ids = [record.id for record in records]
    found = sum(
        connection.execute(
            select(func.count()).where(preferences.c.id.in_(ids[start : start + _SOME]))
        ).scalar_one()
        for start in range(0, len(ids), _SOME)
    )
    return found == len(set(ids))


def add_skip(connection: Connection, source: str, config_digest: str, job_id: str, reason: str) -> None:
    """Remember why nothing was made of a source. One that was deleted leaves nothing behind."""
    referring(connection)
    known = select(preference_sources.c.id).where(preference_sources.c.id == source)
    if connection.execute(known).first():
        values = {"source": source, "config_digest": config_digest, "job_id": job_id, "reason": reason}
        put(connection, skipped_sources, **values)
