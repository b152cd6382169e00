"""Preference sources and records, and their deletion by study."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, delete, func, select

from hscr.records import PreferenceRecord, PreferenceSource, now
from hscr.store.database import Database
from hscr.store.tables import (
    adapter_records,
    answer_dependence,
    images,
    preference_sources,
    preferences,
    skipped_sources,
    tombstones,
)
from hscr.store.writers import add_once, put, referring, removing


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
        """Tombstone a study and drop what was derived from it.

        Returns the adapters that were trained on it, and the image digests nothing refers to any more.
        """
        with self._database.write() as connection:
            removing(connection)
            trained = connection.execute(
                select(adapter_records.c.adapter).where(adapter_records.c.study == study).distinct()
            ).scalars()
            adapters = sorted(trained)
            for table in (preferences, preference_sources, answer_dependence):
                connection.execute(delete(table).where(table.c.study == study))
            held = delete(images).where(images.c.study == study).returning(images.c.digest)
            dropped = set(connection.execute(held).scalars())
            kept = set(
                connection.execute(select(images.c.digest).where(images.c.digest.in_(dropped))).scalars()
            )
            put(connection, tombstones, study=study, actor=actor, adapters=adapters, created_at=now())
        return adapters, sorted(dropped - kept)

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


def add_skip(connection: Connection, source: str, config_digest: str, job_id: str, reason: str) -> None:
    put(connection, skipped_sources, source=source, config_digest=config_digest, job_id=job_id, reason=reason)
