"""Claim, heartbeat, fencing, and how each end of an attempt settles its job."""

import logging
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest

from hscr.errors import Conflict, HscrError, JobCancelled
from hscr.records import Job, JobKind, JobState
from hscr.store.jobs import MAX_FAILURES
from hscr.store.releases import add_dependence
from hscr.store.store import Store
from tests.waiting import wait_until
from workers.contract import ScorePayload
from workers.leases import AttemptOver, Done, Lease, Terms, run_job

TERMS = Terms(timedelta(seconds=5), heartbeat_seconds=0.05, timeout_seconds=60)


def queued(store: Store) -> Job:
    return store.jobs.submit(Job(kind=JobKind.SCORE))


def run(store: Store, body: Callable[[Lease], Done], terms: Terms = TERMS) -> Job:
    job = queued(store)
    run_job(store, job.id, body, terms)
    return store.jobs.get(job.id)


def until_stopped(lease: Lease) -> Done:
    wait_until(lease.check, seconds=10, what="a reason to stop")
    raise AssertionError("unreachable")


def test_a_body_ends_its_job_with_what_follows(store: Store) -> None:
    def body(lease: Lease) -> Done:
        lease.report(1, 1, "things")
        return Done({"n": 1}, (lease.following(JobKind.EVALUATE, _payload()),))

    job = run(store, body)

    assert (job.state, job.result) == (JobState.SUCCEEDED, {"n": 1})
    assert [(child.kind, child.state) for child in store.jobs.page(parent=job.id)] == [
        (JobKind.EVALUATE, JobState.QUEUED)
    ]
    assert [e.data for e in store.jobs.events(job.id) if e.type == "progress"] == [
        {"done": 1, "total": 1, "what": "things"}
    ]


def test_a_message_for_a_finished_job_does_nothing(store: Store) -> None:
    job = run(store, lambda _: Done({"first": True}))
    run_job(store, job.id, lambda _: Done({"first": False}), TERMS)
    assert store.jobs.get(job.id) == job


def test_a_deliberate_error_becomes_the_jobs_problem(store: Store) -> None:
    def body(_: Lease) -> Done:
        raise Conflict("Too few.", remedy="Add more.")

    job = run(store, body)
    assert job.state is JobState.FAILED
    assert job.error == {"slug": "conflict", "detail": "Too few.", "remedy": "Add more."}


def test_an_unexpected_error_tells_its_kind_and_nothing_of_the_patient(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    question = "does Jane Doe have a tumour?"

    def body(_: Lease) -> Done:
        raise ValueError(question)

    job = queued(store)
    with caplog.at_level(logging.INFO):
        for _ in range(MAX_FAILURES):
            assert store.jobs.get(job.id).state is JobState.QUEUED
            run_job(store, job.id, body, TERMS)
    job = store.jobs.get(job.id)
    assert job.state is JobState.FAILED
    assert "3 attempts; the last: an unexpected ValueError" in (job.error or {})["detail"]
    assert "Jane" not in str(job.error) + caplog.text
    assert "test_leases.py" in caplog.text


def test_a_cancelled_job_stops(store: Store) -> None:
    def body(lease: Lease) -> Done:
        store.jobs.cancel(lease.job.id)
        return until_stopped(lease)

    assert run(store, body).state is JobState.CANCELLED


def test_a_job_that_takes_too_long_fails(store: Store) -> None:
    job = run(store, until_stopped, Terms(timedelta(seconds=5), 0.05, timeout_seconds=0.1))
    assert job.state is JobState.FAILED
    assert "longer than 0.1 s" in (job.error or {})["detail"]


def test_a_worker_that_must_go_hands_its_job_back(store: Store) -> None:
    terms = Terms(timedelta(seconds=5), 0.05, 60, stopping=threading.Event())

    def body(lease: Lease) -> Done:
        terms.stopping.set()
        return until_stopped(lease)

    job = run(store, body, terms)
    assert (job.state, job.attempt) == (JobState.QUEUED, 1)
    assert [entry[1] for entry in store.jobs.due()] == [job.id, job.id]


def test_a_job_whose_child_keeps_dying_is_parked(store: Store) -> None:
    def body(_: Lease) -> Done:
        raise AttemptOver("the GPU child died (signal SIGKILL)")

    job = queued(store)
    for attempt in (1, 2):
        run_job(store, job.id, body, TERMS)
        assert (store.jobs.get(job.id).state, store.jobs.get(job.id).attempt) == (JobState.QUEUED, attempt)
    run_job(store, job.id, body, TERMS)

    parked = store.jobs.get(job.id)
    assert parked.state is JobState.FAILED
    assert "3 attempts" in (parked.error or {})["detail"]


def test_attempts_that_a_worker_had_to_give_up_do_not_count(store: Store) -> None:
    """Nor do they make an earlier failure forgotten."""
    leaving = Terms(timedelta(seconds=5), 0.05, 60, stopping=threading.Event())
    leaving.stopping.set()

    def dies(_: Lease) -> Done:
        raise AttemptOver("the GPU child died (signal SIGKILL)")

    job = queued(store)
    for terms, body in [(TERMS, dies), *[(leaving, until_stopped)] * 4, (TERMS, dies)]:
        run_job(store, job.id, body, terms)
        assert store.jobs.get(job.id).state is JobState.QUEUED
    run_job(store, job.id, dies, TERMS)
    parked = store.jobs.get(job.id)
    assert (parked.state, parked.attempt) == (JobState.FAILED, 7)
    assert "3 attempts; the last: the GPU child died (signal SIGKILL)" in (parked.error or {})["detail"]


def test_a_payload_that_cannot_be_read_is_said_without_its_values(store: Store) -> None:
    job = store.jobs.submit(Job(kind=JobKind.SCORE, payload={"candidate": {"name": "Jane Doe"}, "more": 1}))
    run_job(store, job.id, lambda lease: Done({"read": lease.payload(ScorePayload)}), TERMS)
    parked = store.jobs.get(job.id)
    assert (parked.state, parked.attempt) == (JobState.FAILED, 1)
    assert (parked.error or {})["slug"] == "invalid-input"
    assert "candidate, evaluate, more" in (parked.error or {})["detail"]
    assert "Jane" not in str(parked.error)


def test_a_failing_database_is_another_attempts_business(store: Store) -> None:
    def body(_: Lease) -> Done:
        with store.database.write() as connection:
            connection.exec_driver_sql("SELECT * FROM no_such_table")
        return Done({})

    assert run(store, body).state is JobState.QUEUED


def test_a_job_cancelled_at_the_very_end_is_cancelled(store: Store) -> None:
    def body(lease: Lease) -> Done:
        store.jobs.cancel(lease.job.id)
        with pytest.raises(JobCancelled):
            until_stopped(lease)
        return Done({})

    assert run(store, body).state is JobState.CANCELLED


def test_a_zombie_writes_nothing(store: Store) -> None:
    """An attempt without heartbeat outlives its lease; another takes the job, and the first one wakes up."""
    asleep = Terms(timedelta(seconds=0.05), heartbeat_seconds=60, timeout_seconds=60)

    def zombie(lease: Lease) -> Done:
        store.jobs.resend(unclaimed_for=timedelta(hours=1), silent_for=timedelta(0))
        assert store.jobs.claim(lease.job.id, "other", timedelta(seconds=30))
        return Done(
            {"by": "zombie"}, write=lambda connection: add_dependence(connection, lease.job.id, None, {})
        )

    job = run(store, zombie, asleep)
    assert (job.state, job.attempt, job.result) == (JobState.RUNNING, 2, None)
    assert store.releases.dependence(job.id) == {}


def test_the_heartbeat_notices_a_lost_lease(store: Store) -> None:
    def body(lease: Lease) -> Done:
        # The sweeper's view of a worker that was silent for too long.
        with store.database.write() as connection:
            connection.exec_driver_sql("UPDATE jobs SET attempt = attempt + 1")
        return until_stopped(lease)

    job = run(store, body)
    assert (job.state, job.attempt) == (JobState.RUNNING, 2)


def test_the_heartbeat_keeps_the_lease(store: Store) -> None:
    terms = Terms(timedelta(seconds=0.5), heartbeat_seconds=0.05, timeout_seconds=60)

    def body(lease: Lease) -> Done:
        expiry = _expiry(store, lease.job.id)
        wait_until(lambda: _expiry(store, lease.job.id) > expiry, what="a later expiry")
        assert store.jobs.claim(lease.job.id, "other", timedelta(seconds=1)) is None
        return Done({})

    assert run(store, body, terms).state is JobState.SUCCEEDED


def test_nothing_is_committed_when_the_final_write_fails(store: Store) -> None:
    def body(lease: Lease) -> Done:
        def write(connection: object) -> None:
            add_dependence(connection, lease.job.id, None, {})  # type: ignore[arg-type]
            raise HscrError("no")

        return Done({}, write=write)

    job = run(store, body)
    assert job.state is JobState.FAILED
    assert store.releases.dependence(job.id) == {}


def test_progress_is_thinned_but_its_end_is_kept(store: Store) -> None:
    def body(lease: Lease) -> Done:
        for done in range(1, 101):
            lease.report(done, 100, "steps")
        return Done({})

    job = run(store, body)
    seen = [event.data["done"] for event in store.jobs.events(job.id) if event.type == "progress"]
    assert seen[-1] == 100
    assert len(seen) < 20


def _expiry(store: Store, job_id: str) -> str:
    with store.database.read() as connection:
        query = "SELECT lease_expires_at FROM jobs WHERE id = ?"
        return str(connection.exec_driver_sql(query, (job_id,)).scalar_one())


def _payload():
    from workers.contract import ReleasePayload

    return ReleasePayload(version_name=None, actor="a", reason="r")
