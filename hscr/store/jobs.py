"""Jobs: durable rows, an outbox, leases with fencing, and the story each job tells.

The queue may lose a message or bring it twice; neither matters. Who runs a job is decided by `claim`,
which raises the attempt number, and every write of a task happens inside `fenced`, which fails for an older
attempt.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Self

from sqlalchemy import Connection, RowMapping, Select, bindparam, func, insert, or_, select, update

from hscr.errors import Conflict, HscrError, IdempotencyConflict, LeaseLost, NotFound
from hscr.records import Job, JobEvent, JobKind, JobState, now
from hscr.store.database import Database
from hscr.store.keys import Claim, claim_idempotency, claim_new, find_idempotency
from hscr.store.sightings import Sightings
from hscr.store.tables import job_events, jobs, outbox

MAX_FAILURES = 3
_RESENT = 1000
"""messages at most that one sweep takes for forgotten: its transaction stays short"""
_NEW_JOB, _DUE, _TOLD = insert(jobs), insert(outbox).inline(), insert(job_events)
_ARE_DUE = (  # building a statement takes as long as sending it
    select(outbox.c.id, outbox.c.job_id, outbox.c.kind)
    # A kind that only a newer version knows waits for that version and holds up nothing.
    .where(outbox.c.sent_at.is_(None), outbox.c.kind.in_(list(JobKind)))
    .order_by(outbox.c.id)
    .limit(bindparam("limit"))
)
_SENT = update(outbox).where(outbox.c.id.in_(bindparam("entries", expanding=True)))
FIELDS = [column for column in jobs.c if column.name in Job.model_fields]


class Asked(NamedTuple):
    """A job that somebody asks for. `idempotency` is (key, request digest), scoped to the job's API key."""

    job: Job
    idempotency: tuple[str, str] | None = None

    @property
    def claim(self) -> Claim | None:
        if self.idempotency is None:
            return None
        return Claim(self.job.key_id or "local", *self.idempotency, self.job.id)


class Jobs:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._leases = Sightings(trusting=True)

    def submit(self, job: Job, *, idempotency: tuple[str, str] | None = None) -> Job:
        """Make the job durable and due.

        Returns the earlier job when the same request came before. Raises IdempotencyConflict.
        """
        (outcome,) = self.submit_all([Asked(job, idempotency)])
        if isinstance(outcome, HscrError):
            raise outcome
        return outcome

    def submit_all(self, asked: Sequence[Asked]) -> list[Job | IdempotencyConflict]:
        """`submit` for each, and all made durable by one commit."""
        with self._database.write() as connection:
            claims = [each.claim for each in asked if each.claim is not None]
            new = claim_new(connection, claims)
            submit_in(connection, *(each.job for each in asked if each.claim is None or each.job.id in new))
            return [_outcome(connection, each, new) for each in asked]

    def repeated(self, owner: str, key: str, request_digest: str) -> Job | None:
        """The job this request made before under its idempotency key. Raises IdempotencyConflict."""
        with self._database.read() as connection:
            known = find_idempotency(connection, owner, key, request_digest)
            return None if known is None else _get(connection, known)

    def get(self, job_id: str) -> Job:
        with self._database.look() as connection:
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
        query = select(*FIELDS).where(
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
        """Take the job if nobody holds it. None when it is done, cancelled, or in other hands.

        Dead hands count until `resend` has seen them still for long enough: by a clock that jumped or is
        another machine's, a lease may look over that is not.
        """
        with self._database.write() as connection:
            moment = now()
            taken = connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id, jobs.c.state == JobState.QUEUED, ~jobs.c.cancel_requested)
                .values(
                    state=JobState.RUNNING,
                    attempt=jobs.c.attempt + 1,
                    started_at=func.coalesce(jobs.c.started_at, moment),
                    lease_owner=owner,
                    lease_expires_at=moment + lease,
                    last_event=jobs.c.last_event + 1,
                )
                .returning(*FIELDS, jobs.c.last_event)
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
        submit_in(connection, *then)

    def fail(self, job_id: str, attempt: int, error: HscrError) -> None:
        with self.fenced(job_id, attempt) as connection:
            state = JobState.CANCELLED if error.slug == "job-cancelled" else JobState.FAILED
            _finish(connection, job_id, state, error=_problem(error))

    def tell(self, job_id: str, attempt: int, message: str) -> None:
        """A line in the job's story that is neither progress nor an end, such as a warning."""
        with self.fenced(job_id, attempt) as connection:
            _event(connection, job_id, "log", {"message": message})

    def hand_back(self, job_id: str, attempt: int, reason: str, *, later: bool = False) -> None:
        """The worker must go (SIGTERM), which is no fault of the job: let another attempt begin.

        `later`: only when the sweeper finds the job unclaimed, because at once it would fare no better.
        """
        with self.fenced(job_id, attempt) as connection:
            _requeue(connection, job_id, {"reason": reason}, sent_at=now() if later else None)

    def attempt_failed(self, job_id: str, attempt: int, reason: str) -> None:
        """Let another attempt begin, or park the job with the reason when it has failed too often."""
        with self.fenced(job_id, attempt) as connection:
            _requeue_or_park(connection, job_id, reason)

    # -- the client's side ---------------------------------------------------------------------------------

    def cancel(self, job_id: str) -> Job:
        """Stop a job: a queued one at once, a running one as soon as its worker sees the request."""
        with self._database.write() as connection:
            return cancel_in(connection, job_id)

    def retry(self, job_id: str, *, key_id: str | None = None) -> Job:
        """Submit what failed or was cancelled again, as a new job; however often, it is one and the same.

        Raises NotFound, Conflict for a job that has not ended, or has ended well.
        """
        job = self.get(job_id)
        if job.state not in {JobState.FAILED, JobState.CANCELLED}:
            raise Conflict(
                f"The job is {job.state}: there is nothing to repeat.",
                remedy="Only failed and cancelled jobs are submitted again.",
            )
        again = Job(kind=job.kind, payload=job.payload, parent=job.id, key_id=key_id or job.key_id)
        with self._database.write() as connection:
            known = claim_idempotency(connection, "retry", job.id, job.id, again.id)
            if known is not None:
                return _get(connection, known)
            submit_in(connection, again)
        return again

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
        with self._database.look() as connection:
            rows = connection.execute(_ARE_DUE, {"limit": limit}).all()
        return [(row.id, row.job_id, JobKind(row.kind)) for row in rows]

    def mark_sent(self, entries: Sequence[int]) -> None:
        with self._database.write() as connection:
            connection.execute(_SENT, {"entries": entries, "sent_at": now()})

    def sent(self) -> Counter[JobKind]:
        """How many jobs of each kind are queued, less those whose message is still to be sent."""
        queued = select(jobs.c.kind, func.count()).where(jobs.c.state == JobState.QUEUED)
        # By itself: a join for each job would look through all that were due before, until a vacuum.
        due = select(outbox.c.kind, func.count(outbox.c.job_id.distinct())).where(outbox.c.sent_at.is_(None))
        with self._database.read() as connection:
            return _by_kind(connection, queued) - _by_kind(connection, due)

    def resend(
        self,
        *,
        unclaimed_for: timedelta,
        silent_for: timedelta,
        kinds: Collection[JobKind] = tuple(JobKind),
    ) -> list[str]:
        """Send again what a dead worker held or the queue forgot; park what failed too often.

        Dead is who has not renewed the lease for `silent_for` while this process looked on, whatever the
        clocks say. Only of `kinds` may the queue have forgotten any. Returns the ids of the jobs that were
        requeued or parked.
        """
        moment = now()
        silent, touched = self._silent(silent_for), []
        with self._database.write() as connection:
            # What somebody else holds right now is neither dead nor forgotten.
            query = select(*FIELDS, jobs.c.lease_expires_at).where(
                jobs.c.id.in_([each.id for each in silent])
            )
            rows = connection.execute(query.with_for_update(skip_locked=True)).mappings().all()
            for row in (row for row in rows if _Held.of(row) in silent):
                _recover(connection, _job(row))
                touched.append(row["id"])
            forgotten = connection.execute(_forgotten(moment, unclaimed_for, kinds)).scalars().all()
            connection.execute(update(outbox).where(outbox.c.job_id.in_(forgotten)).values(sent_at=None))
            touched += forgotten
        return touched

    def _silent(self, silent_for: timedelta) -> set["_Held"]:
        """The running jobs whose lease has stayed as it is for so long."""
        query = select(jobs.c.id, jobs.c.attempt, jobs.c.lease_expires_at)
        with self._database.read() as connection:
            running = connection.execute(query.where(jobs.c.state == JobState.RUNNING)).mappings().all()
        held = {_Held.of(row) for row in running}
        alive = self._leases.alive({each.attempted: each.until for each in held}, silent_for)
        return {each for each in held if each.attempted not in alive}


class _Held(NamedTuple):
    """A lease as it was seen; one that was renewed since, given back or taken again is another."""

    id: str
    attempt: int
    until: datetime

    @classmethod
    def of(cls, row: RowMapping) -> Self:
        return cls(row["id"], row["attempt"], row["lease_expires_at"])

    @property
    def attempted(self) -> str:
        return f"{self.id}/{self.attempt}"


def cancel_in(connection: Connection, job_id: str) -> Job:
    """`Jobs.cancel` in the caller's transaction. Raises NotFound, Conflict for a job that has ended."""
    job = _get(connection, job_id, lock=True)
    if job.state.final:
        raise Conflict(f"The job is already {job.state}.", remedy="There is nothing left to cancel.")
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(cancel_requested=True))
    if job.state is JobState.QUEUED:
        _finish(connection, job_id, JobState.CANCELLED)
    return _get(connection, job_id)


def submit_in(connection: Connection, *new: Job) -> None:
    """Row, outbox entry and first event of each in the caller's transaction."""
    if not new:
        return
    connection.execute(_NEW_JOB, [{**job.model_dump(), "last_event": 1} for job in new])
    connection.execute(_DUE, [{"job_id": job.id, "kind": job.kind, "created_at": now()} for job in new])
    connection.execute(_TOLD, [_told(job.id, 1, "state", {"state": job.state}) for job in new])


def _outcome(connection: Connection, asked: Asked, new: Set[str]) -> Job | IdempotencyConflict:
    if asked.claim is None or asked.job.id in new:
        return asked.job
    owner, key, request_digest, _ = asked.claim
    try:
        known = find_idempotency(connection, owner, key, request_digest)
    except IdempotencyConflict as conflict:
        return conflict
    assert known is not None, "a key that is not new has a resource"
    return _get(connection, known)


def _by_kind(connection: Connection, query: Select[str, int]) -> Counter[JobKind]:
    """Of the kinds that this version knows."""
    kind = query.selected_columns.kind
    rows = connection.execute(query.where(kind.in_(JobKind)).group_by(kind))
    return Counter({JobKind(row.kind): row[1] for row in rows})


def _forgotten(moment: datetime, unclaimed_for: timedelta, kinds: Collection[JobKind]) -> Select[str]:
    """Queued jobs whose newest message was sent long ago and which nobody has claimed since.

    A message that was sent well ahead of now was sent before the clock was set back.
    """
    newest = select(func.max(outbox.c.sent_at)).where(outbox.c.job_id == jobs.c.id).scalar_subquery()
    unsent = select(outbox.c.id).where(outbox.c.job_id == jobs.c.id, outbox.c.sent_at.is_(None)).exists()
    lost = or_(newest < moment - unclaimed_for, newest > moment + abs(unclaimed_for))
    queued = jobs.c.state == JobState.QUEUED
    forgotten = select(jobs.c.id).where(queued, jobs.c.kind.in_(kinds), lost, ~unsent)
    return forgotten.with_for_update(skip_locked=True).limit(_RESENT)


def _recover(connection: Connection, job: Job) -> None:
    if job.cancel_requested:
        _finish(connection, job.id, JobState.CANCELLED)
    else:
        _requeue_or_park(connection, job.id, "the worker's lease expired")


def _requeue_or_park(connection: Connection, job_id: str, reason: str) -> None:
    failures = 1 + _failures(connection, job_id)
    if failures < MAX_FAILURES:
        _requeue(connection, job_id, {"reason": reason, "failures": failures})
        return
    parked = HscrError(
        f"The job did not survive {failures} attempts; the last: {reason}.",
        remedy="Read the worker's log for the cause, then submit it again: `hscr jobs retry`.",
    )
    _finish(connection, job_id, JobState.FAILED, error=_problem(parked))


def _failures(connection: Connection, job_id: str) -> int:
    """Attempts that failed. `attempt` counts those too that a worker handed back because it had to go."""
    query = select(job_events.c.data).where(job_events.c.job_id == job_id, job_events.c.type == "state")
    return max((data.get("failures", 0) for data in connection.execute(query).scalars()), default=0)


def _requeue(
    connection: Connection, job_id: str, why: dict[str, Any], *, sent_at: datetime | None = None
) -> None:
    free = {"state": JobState.QUEUED, "lease_owner": None, "lease_expires_at": None}
    row = connection.execute(
        update(jobs).where(jobs.c.id == job_id).values(**free).returning(jobs.c.kind)
    ).one()
    message = {"job_id": job_id, "kind": row.kind, "created_at": now(), "sent_at": sent_at}
    connection.execute(_DUE, message)
    _event(connection, job_id, "state", {"state": JobState.QUEUED, **why})


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
    connection.execute(_TOLD, _told(job_id, seq, kind, data))


def _told(job_id: str, seq: int, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"job_id": job_id, "seq": seq, "type": kind, "data": data, "created_at": now()}


def _problem(error: HscrError) -> dict[str, str]:
    return {"slug": error.slug, "detail": error.detail, "remedy": error.remedy}


def _get(connection: Connection, job_id: str, *, lock: bool = False) -> Job:
    query = select(*FIELDS).where(jobs.c.id == job_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None:
        raise NotFound(f"No job {job_id}.", remedy="`GET /v1/jobs` lists them.")
    return _job(row)


def _job(row: RowMapping) -> Job:
    return Job.model_validate({column.name: row[column.name] for column in FIELDS})
