"""The tables. Immutable things keep their whole record as JSON beside the columns that are searched."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def without_zone(moment: datetime) -> datetime:
    """The same moment as the database keeps it: in UTC, without saying so."""
    return moment.astimezone(UTC).replace(tzinfo=None)


def with_zone(kept: datetime | None) -> datetime | None:
    return None if kept is None else kept.replace(tzinfo=UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """Timezone-aware in Python, UTC in the database (SQLite would forget the zone)."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else without_zone(value)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return with_zone(value)


def _id(length: int = 80) -> Column[str]:
    return Column("id", String(length), primary_key=True)


def _created() -> Column[datetime]:
    return Column("created_at", UtcDateTime, nullable=False, index=True)


def _body() -> Column[Any]:
    return Column("body", JSON, nullable=False)


api_keys = Table(
    "api_keys", metadata, _id(),
    Column("hash", String(64), nullable=False, unique=True),
    Column("name", String(200), nullable=False),
    Column("role", String(20), nullable=False),
    Column("project", String(100), nullable=False),
    Column("train_consent", Boolean, nullable=False),
    _created(),
    Column("revoked_at", UtcDateTime),
)  # fmt: skip

idempotency_keys = Table(
    "idempotency_keys", metadata,
    Column("owner", String(80), primary_key=True),
    Column("key", String(200), primary_key=True),
    Column("request_digest", String(64), nullable=False),
    Column("resource", String(80), nullable=False),
    _created(),
)  # fmt: skip

images = Table(
    "images", metadata,
    Column("digest", String(64), primary_key=True),
    Column("study", String(100), primary_key=True),
    _created(),
    Column("expires_at", UtcDateTime, index=True),
)  # fmt: skip

answers = Table(
    "answers", metadata, _id(),
    Column("project", String(100), nullable=False),
    Column("study", String(100), nullable=False, index=True),
    Column("adapter", String(120), index=True),
    _created(),
    _body(),
)  # fmt: skip

feedback = Table(
    "feedback", metadata, _id(),
    Column("answer_id", String(80), ForeignKey("answers.id"), nullable=False, index=True),
    Column("verdict", String(20), nullable=False),
    _created(),
    _body(),
)  # fmt: skip

preference_sources = Table(
    "preference_sources", metadata, _id(),
    Column("study", String(100), nullable=False, index=True),
    Column("project", String(100), nullable=False),
    Column("consent", Boolean, nullable=False),
    _created(),
    _body(),
)  # fmt: skip

preferences = Table(
    "preferences", metadata, _id(),
    Column("source", String(80), nullable=False, index=True),
    Column("study", String(100), nullable=False, index=True),
    Column("project", String(100), nullable=False),
    Column("method", String(40), nullable=False),
    Column("config_digest", String(64), nullable=False),
    Column("consent", Boolean, nullable=False),
    Column("job_id", String(80), index=True),
    _created(),
    _body(),
)  # fmt: skip

skipped_sources = Table(
    "skipped_sources", metadata,
    Column("source", String(80), primary_key=True),
    Column("config_digest", String(64), primary_key=True),
    Column("job_id", String(80), nullable=False),
    Column("reason", Text, nullable=False),
)  # fmt: skip

tombstones = Table(
    "tombstones", metadata,
    Column("study", String(100), primary_key=True),
    Column("actor", String(80), nullable=False),
    Column("adapters", JSON, nullable=False),
    _created(),
)  # fmt: skip

jobs = Table(
    "jobs", metadata, _id(),
    Column("kind", String(20), nullable=False),
    Column("state", String(20), nullable=False, index=True),
    Column("payload", JSON, nullable=False),
    Column("result", JSON),
    Column("error", JSON),
    Column("attempt", Integer, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("parent", String(80)),
    Column("key_id", String(80)),
    _created(),
    Column("started_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
    Column("lease_owner", String(120)),
    Column("lease_expires_at", UtcDateTime, index=True),
    Column("last_event", Integer, nullable=False),
)  # fmt: skip

job_events = Table(
    "job_events", metadata,
    Column("job_id", String(80), ForeignKey("jobs.id"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("type", String(20), nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)  # fmt: skip

outbox = Table(
    "outbox", metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("job_id", String(80), ForeignKey("jobs.id"), nullable=False, index=True),
    Column("kind", String(20), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("sent_at", UtcDateTime),
)  # fmt: skip

adapters = Table(
    "adapters", metadata,
    Column("name", String(120), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("state", String(20), nullable=False),
    Column("job_id", String(80), nullable=False, index=True),
    _created(),
    _body(),
)  # fmt: skip

adapter_records = Table(
    "adapter_records", metadata,
    Column("adapter", String(120), ForeignKey("adapters.name"), primary_key=True),
    Column("record", String(80), primary_key=True),
    Column("study", String(100), nullable=False, index=True),
    Column("source", String(80), nullable=False, index=True),
)  # fmt: skip

evaluations = Table(
    "evaluations", metadata, _id(),
    Column("candidate", String(120), index=True),
    Column("active", String(120)),
    Column("verdict", String(20), nullable=False),
    Column("job_id", String(80), index=True),
    _created(),
    _body(),
)  # fmt: skip

evaluation_outcomes = Table(
    "evaluation_outcomes",
    metadata,
    Column("evaluation", String(80), ForeignKey("evaluations.id"), primary_key=True),
    Column("version", String(120), primary_key=True),
    Column("body", JSON, nullable=False),
)

dependence_scores = Table(
    "dependence_scores", metadata,
    Column("job_id", String(80), primary_key=True),
    Column("version", String(120), primary_key=True),
    Column("body", JSON, nullable=False),
)  # fmt: skip

answer_dependence = Table(
    "answer_dependence", metadata,
    Column("answer_id", String(80), ForeignKey("answers.id"), primary_key=True),
    Column("dropping", String(64), primary_key=True),
    Column("study", String(100), nullable=False, index=True),
    _created(),
    _body(),
)  # fmt: skip

pointer = Table(
    "pointer", metadata,
    Column("id", Integer, primary_key=True),
    Column("active", String(120)),
    Column("previous", String(120)),
    Column("candidate", String(120)),
    Column("share", Float, nullable=False),
    Column("epoch", Integer, nullable=False),
)  # fmt: skip

pointer_history = Table(
    "pointer_history", metadata,
    Column("epoch", Integer, primary_key=True),
    Column("action", String(20), nullable=False),
    Column("actor", String(80), nullable=False),
    Column("reason", Text, nullable=False),
    Column("evaluation", String(80)),
    Column("override", Boolean, nullable=False),
    _created(),
    _body(),
)  # fmt: skip

replicas = Table(
    "replicas", metadata, _id(120),
    Column("seen_at", UtcDateTime, nullable=False),
    _body(),
)  # fmt: skip

gateways = Table(
    "gateways", metadata, _id(120),
    Column("epoch", Integer, nullable=False),
    Column("in_flight", JSON, nullable=False),
    Column("seen_at", UtcDateTime, nullable=False),
)  # fmt: skip

canary_counts = Table(
    "canary_counts", metadata,
    Column("epoch", Integer, primary_key=True),
    Column("gateway", String(120), primary_key=True),
    Column("versions", JSON, nullable=False),
)  # fmt: skip

version_leases = Table(
    "version_leases", metadata,
    Column("holder", String(80), primary_key=True),
    Column("version", String(120), primary_key=True),
    Column("expires_at", UtcDateTime, nullable=False),
)  # fmt: skip

Index("ix_preferences_live", preferences.c.consent, preferences.c.method, preferences.c.created_at)
Index("ix_jobs_kind_state", jobs.c.kind, jobs.c.state)
_DUE = outbox.c.sent_at.is_(None)
Index("ix_outbox_due", outbox.c.id, sqlite_where=_DUE, postgresql_where=_DUE)
