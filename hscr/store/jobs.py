"""Jobs: durable rows, an outbox, leases with fencing, and the story each job tells.

The queue may lose a message or bring it twice; neither matters. Who runs a job is decided by `claim`,
which raises the attempt number, and every write of a task happens inside `fenced`, which fails for an older
attempt.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, and_, func, insert, or_, select, update

from hscr.errors import Conflict, HscrError, LeaseLost, NotFound
from hscr.records import Job, JobEvent, JobKind, JobState, now
from hscr.store.database import Database
from hscr.store.keys import claim_idempotency
from hscr.store.tables import job_events, jobs, outbox

MAX_ATTEMPTS = 3
_FIELDS = [column for column in jobs.c if column.name in Job.model_fields]


class Jobs:
    def __init__(self, database: Database) -> None:
        self._database = database

    def submit(self, job: Job, *, idempotency: tuple[str, str] | None = None) -> Job:
        """Make the job durable and due. `idempotency` is (key, request digest), scoped to the job's API key.

        Returns the earlier job when the same request came before. Raises IdempotencyConflict.
        """
        with self._database.write() as connection:
            if idempotency is not None:
                key, request_digest = idempotency
                known = claim_idempotency(connection, job.key_id or "local", key, request_digest, job.id)
                if known is not None:
                    return _get(connection, known)
            submit_in(connection, job)
        return job

    def get(self, job_id: str) -> Job:
        with self._database.read() as connection:
            return _get(connection, job_id)

    def page(
        self,
        *,
        kind: JobKind | None = None,
        state: JobState | None = None,
        parent: str | None = None,
        limit: int = 50,
        before: datetime | None = None,
    ) -> list[Job]:
        """Newest first."""
        wanted = {jobs.c.kind: kind, jobs.c.state: state, jobs.c.parent: parent}
        query = select(*_FIELDS).where(
            *[column == value for column, value in wanted.items() if value is not None]
        )
        if before is not None:
            query = query.where(jobs.c.created_at < before)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(jobs.c.created_at.desc()).limit(limit)).mappings()
            return [_job(row) for row in rows]

    def count(self, *states: JobState) -> int:
        with self._database.read() as connection:
            return connection.execute(select(func.count()).where(jobs.c.state.in_(states))).scalar_one()

    # -- the worker's side ---------------------------------------------------------------------------------

    def claim(self, job_id: str, owner: str, lease: timedelta) -> Job | None:
        """Take the job if nobody holds it. None when it is done, cancelled, or in other hands."""
        with self._database.write() as connection:
            moment = now()
            free = or_(
                jobs.c.state == JobState.QUEUED,
                and_(jobs.c.state == JobState.RUNNING, jobs.c.lease_expires_at < moment),
            )
            taken = connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id, free, jobs.c.cancel_requested.is_(False))
                .values(
                    state=JobState.RUNNING,
                    attempt=jobs.c.attempt + 1,
                    started_at=func.coalesce(jobs.c.started_at, moment),
                    lease_owner=owner,
                    lease_expires_at=moment + lease,
                    last_event=jobs.c.last_event + 1,
                )
                .returning(*_FIELDS, jobs.c.last_event)
            )
            row = taken.mappings().first()
            if row is None:
                return None
            job = _job(row)
            begun = {"state": JobState.RUNNING, "attempt": job.attempt}
            _write_event(connection, job_id, row["last_event"], "state", begun)
            return job

    def heartbeat(self, job_id: str, attempt: int, lease: timedelta) -> bool:
        """Keep the lease. Returns whether somebody asked the job to stop. Raises LeaseLost."""
        with self.fenced(job_id, attempt) as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(lease_expires_at=now() + lease))
            return _get(connection, job_id).cancel_requested

    @contextmanager
    def fenced(self, job_id: str, attempt: int) -> Iterator[Connection]:
        """A transaction that only the present attempt of a running job can commit. Raises LeaseLost."""
        with self._database.write() as connection:
            query = select(jobs.c.attempt, jobs.c.state).where(jobs.c.id == job_id).with_for_update()
            row = connection.execute(query).first()
            if row is None or row.attempt != attempt or row.state != JobState.RUNNING:
                raise LeaseLost(f"Attempt {attempt} of {job_id} no longer owns the job.")
            yield connection

    def report(self, job_id: str, attempt: int, data: dict[str, Any]) -> None:
        """A progress event, as `{"done": n, "total": n, "what": ...}`."""
        with self.fenced(job_id, attempt) as connection:
            _event(connection, job_id, "progress", data)

    def succeed(self, connection: Connection, job_id: str, result: dict[str, Any], *then: Job) -> None:
        """End the job inside a `fenced` transaction; the jobs that follow become due with it."""
        _finish(connection, job_id, JobState.SUCCEEDED, result=result)
        for following in then:
            submit_in(connection, following)

    def fail(self, job_id: str, attempt: int, error: HscrError) -> None:
        with self.fenced(job_id, attempt) as connection:
            state = JobState.CANCELLED if error.slug == "job-cancelled" else JobState.FAILED
            _finish(connection, job_id, state, error=_problem(error))

    def hand_back(self, job_id: str, attempt: int, reason: str) -> None:
        """The worker must go (SIGTERM) or met a passing trouble: let another attempt begin."""
        with self.fenced(job_id, attempt) as connection:
            _requeue(connection, job_id, reason)

    # -- the client's side ---------------------------------------------------------------------------------

    def cancel(self, job_id: str) -> Job:
        """Stop a job: a queued one at once, a running one as soon as its worker sees the request."""
        with self._database.write() as connection:
            job = _get(connection, job_id, lock=True)
            if job.state.final:
                raise Conflict(f"The job is already {job.state}.", remedy="There is nothing left to cancel.")
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(cancel_requested=True))
            if job.state is JobState.QUEUED:
                _finish(connection, job_id, JobState.CANCELLED)
            return _get(connection, job_id)

    def events(self, job_id: str, *, after: int = 0, limit: int = 500) -> list[JobEvent]:
        query = (
            select(job_events)
            .where(job_events.c.job_id == job_id, job_events.c.seq > after)
            .order_by(job_events.c.seq)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [JobEvent.model_validate(dict(row)) for row in connection.execute(query).mappings()]

    # -- relay and sweeper ---------------------------------------------------------------------------------

    def due(self, limit: int = 100) -> Sequence[tuple[int, str, JobKind]]:
        """Outbox entries not yet sent: (entry, job id, kind)."""
        query = select(outbox.c.id, outbox.c.job_id, outbox.c.kind).where(outbox.c.sent_at.is_(None))
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(outbox.c.id).limit(limit)).all()
        return [(row.id, row.job_id, JobKind(row.kind)) for row in rows]

    def mark_sent(self, entries: Sequence[int]) -> None:
        with self._database.write() as connection:
            connection.execute(update(outbox).where(outbox.c.id.in_(entries)).values(sent_at=now()))

    def resend(self, *, unclaimed_for: timedelta) -> list[str]:
        """Send again what a dead worker held or the queue forgot; park what failed too often.

        Returns the ids of the jobs that were requeued or parked.
        """
        moment = now()
        expired = and_(jobs.c.state == JobState.RUNNING, jobs.c.lease_expires_at < moment)
        touched = []
        with self._database.write() as connection:
            # What somebody else holds right now is neither dead nor forgotten.
            query = select(*_FIELDS).where(expired).with_for_update(skip_locked=True)
            for job in [_job(row) for row in connection.execute(query).mappings()]:
                _recover(connection, job)
                touched.append(job.id)
            for job_id in connection.execute(_forgotten(moment - unclaimed_for)).scalars().all():
                connection.execute(update(outbox).where(outbox.c.job_id == job_id).values(sent_at=None))
                touched.append(job_id)
        return touched


def submit_in(connection: Connection, job: Job) -> None:
    """Row, outbox entry and first event in the caller's transaction."""
    connection.execute(insert(jobs).values(**job.model_dump(), last_event=1))
    connection.execute(insert(outbox).values(job_id=job.id, kind=job.kind, created_at=now()))
    _write_event(connection, job.id, 1, "state", {"state": job.state})


def _forgotten(before: datetime) -> Select[str]:
    """Queued jobs whose newest message was sent long ago and which nobody has claimed since."""
    newest = select(func.max(outbox.c.sent_at)).where(outbox.c.job_id == jobs.c.id).scalar_subquery()
    unsent = select(outbox.c.id).where(outbox.c.job_id == jobs.c.id, outbox.c.sent_at.is_(None)).exists()
    forgotten = select(jobs.c.id).where(jobs.c.state == JobState.QUEUED, newest < before, ~unsent)
    return forgotten.with_for_update(skip_locked=True)


def _recover(connection: Connection, job: Job) -> None:
    if job.cancel_requested:
        _finish(connection, job.id, JobState.CANCELLED)
    elif job.attempt >= MAX_ATTEMPTS:
        parked = HscrError(
            f"The job's worker died {job.attempt} times.",
            remedy="Read the worker's log for the cause, then submit the job again.",
        )
        _finish(connection, job.id, JobState.FAILED, error=_problem(parked))
    else:
        _requeue(connection, job.id, "the worker's lease expired")


def _requeue(connection: Connection, job_id: str, reason: str) -> None:
    free = {"state": JobState.QUEUED, "lease_owner": None, "lease_expires_at": None}
    row = connection.execute(
        update(jobs).where(jobs.c.id == job_id).values(**free).returning(jobs.c.kind)
    ).one()
    connection.execute(insert(outbox).values(job_id=job_id, kind=row.kind, created_at=now()))
    _event(connection, job_id, "state", {"state": JobState.QUEUED, "reason": reason})


def _finish(
    connection: Connection,
    job_id: str,
    state: JobState,
    *,
    result: dict[str, Any] | None = None,
    error: dict[str, str] | None = None,
) -> None:
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id)
        .values(state=state, result=result, error=error, finished_at=now(), lease_expires_at=None)
    )
    _event(connection, job_id, "state", {"state": state, **({"error": error} if error else {})})


def _event(connection: Connection, job_id: str, kind: str, data: dict[str, Any]) -> None:
    seq = connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id)
        .values(last_event=jobs.c.last_event + 1)
        .returning(jobs.c.last_event)
    ).scalar_one()
    _write_event(connection, job_id, seq, kind, data)


def _write_event(connection: Connection, job_id: str, seq: int, kind: str, data: dict[str, Any]) -> None:
    connection.execute(
        insert(job_events).values(job_id=job_id, seq=seq, type=kind, data=data, created_at=now())
    )


def _problem(error: HscrError) -> dict[str, str]:
    return {"slug": error.slug, "detail": error.detail, "remedy": error.remedy}


def _get(connection: Connection, job_id: str, *, lock: bool = False) -> Job:
    query = select(*_FIELDS).where(jobs.c.id == job_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None:
        raise NotFound(f"No job {job_id}.", remedy="`GET /v1/jobs` lists them.")
    return _job(row)


def _job(row: RowMapping) -> Job:
    return Job.model_validate({name: value for name, value in row.items() if name != "last_event"})
