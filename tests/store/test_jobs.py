"""The store's promises about jobs: durable, run once at a time, fenced, never lost."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

from hscr.errors import Conflict, IdempotencyConflict, JobCancelled, LeaseLost, NotFound
from hscr.records import Job, JobKind, JobState
from hscr.store.jobs import MAX_FAILURES, Asked
from hscr.store.store import Store

LEASE = timedelta(seconds=30)
EXPIRED = timedelta(seconds=-1)
AT_ONCE = timedelta(0)


def submit(store: Store, **values: object) -> Job:
    return store.jobs.submit(Job.model_validate({"kind": JobKind.GENERATE, **values}))


def test_submitting_makes_row_outbox_entry_and_first_event_together(store: Store) -> None:
    job = submit(store, payload={"n": 1})
    assert store.jobs.get(job.id).payload == {"n": 1}
    assert [(job_id, kind) for _, job_id, kind in store.jobs.due()] == [(job.id, JobKind.GENERATE)]
    assert [(event.seq, event.data["state"]) for event in store.jobs.events(job.id)] == [(1, "queued")]


def test_a_sent_entry_is_not_due_again(store: Store) -> None:
    submit(store)
    store.jobs.mark_sent([entry for entry, _, _ in store.jobs.due()])
    assert store.jobs.due() == []


def test_the_same_idempotency_key_returns_the_first_job(store: Store) -> None:
    first = store.jobs.submit(Job(kind=JobKind.GENERATE), idempotency=("key", "digest"))
    again = store.jobs.submit(Job(kind=JobKind.GENERATE), idempotency=("key", "digest"))
    assert again.id == first.id
    assert len(store.jobs.page()) == 1


def test_the_same_idempotency_key_with_another_body_is_refused_and_leaves_nothing(store: Store) -> None:
    store.jobs.submit(Job(kind=JobKind.GENERATE), idempotency=("key", "digest"))
    with pytest.raises(IdempotencyConflict, match="new key"):
        store.jobs.submit(Job(kind=JobKind.GENERATE), idempotency=("key", "other"))
    assert len(store.jobs.page()) == 1


def test_idempotency_keys_of_two_owners_do_not_meet(store: Store) -> None:
    first = store.jobs.submit(Job(kind=JobKind.GENERATE, key_id="a"), idempotency=("key", "digest"))
    other = store.jobs.submit(Job(kind=JobKind.GENERATE, key_id="b"), idempotency=("key", "other"))
    assert first.id != other.id


def test_jobs_asked_for_together_are_each_made_found_again_or_refused(store: Store) -> None:
    known = store.jobs.submit(Job(kind=JobKind.GENERATE), idempotency=("known", "digest"))
    new, twin, plain, again, other = (Job(kind=JobKind.SCORE, payload={"n": n}) for n in range(5))
    made, same, without, found, refused = store.jobs.submit_all(
        [
            Asked(new, ("new", "digest")),
            Asked(twin, ("new", "digest")),
            Asked(plain),
            Asked(again, ("known", "digest")),
            Asked(other, ("known", "other")),
        ]
    )
    assert made == same
    assert made in (new, twin)
    assert (without, found) == (plain, known)
    assert isinstance(refused, IdempotencyConflict)
    assert {job.id for job in store.jobs.page()} == {known.id, plain.id, made.id}
    assert sorted(job_id for _, job_id, _ in store.jobs.due()) == sorted([known.id, plain.id, made.id])
    for job in (plain, made):
        assert [(event.seq, event.data["state"]) for event in store.jobs.events(job.id)] == [(1, "queued")]


def test_a_look_at_the_outbox_takes_as_long_however_much_was_sent(store: Store) -> None:
    store.jobs.submit_all([Asked(Job(kind=JobKind.SCORE)) for _ in range(2000)])
    store.jobs.mark_sent([entry for entry, _, _ in store.jobs.due(limit=2000)])
    asked: list[tuple[str, Any]] = []
    event.listen(store.database._looker, "before_cursor_execute", lambda *call: asked.append(call[2:4]))
    assert store.jobs.due() == []
    explain = {"sqlite": "EXPLAIN QUERY PLAN ", "postgresql": "EXPLAIN "}
    with store.database.read() as connection:
        statement, parameters = next(call for call in asked if "outbox" in call[0])
        plan = connection.exec_driver_sql(explain[connection.dialect.name] + statement, parameters).all()
    assert "ix_outbox_due" in str(plan)


def test_only_one_worker_claims_a_job(store: Store) -> None:
    job = submit(store)
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda n: store.jobs.claim(job.id, f"worker-{n}", LEASE), range(8)))
    assert [claim.attempt for claim in claims if claim] == [1]


def test_a_silent_lease_is_taken_away_and_fences_the_first_attempt(store: Store) -> None:
    job = submit(store)
    assert store.jobs.claim(job.id, "zombie", EXPIRED) is not None
    assert store.jobs.claim(job.id, "worker", LEASE) is None, "only a watcher can tell that it is dead"
    assert store.jobs.resend(unclaimed_for=LEASE, silent_for=AT_ONCE) == [job.id]
    second = store.jobs.claim(job.id, "worker", LEASE)
    assert second is not None
    assert second.attempt == 2
    with pytest.raises(LeaseLost), store.jobs.fenced(job.id, 1):
        raise AssertionError("a zombie entered the transaction")
    with pytest.raises(LeaseLost):
        store.jobs.heartbeat(job.id, 1, LEASE)
    with pytest.raises(LeaseLost):
        store.jobs.report(job.id, 1, {"done": 1})


def test_a_fenced_transaction_rolls_back_whole(store: Store) -> None:
    job = submit(store)
    store.jobs.claim(job.id, "worker", LEASE)
    with pytest.raises(IntegrityError), store.jobs.fenced(job.id, 1) as connection:
        store.jobs.succeed(connection, job.id, {"n": 1}, Job(id=job.id, kind=JobKind.FINETUNE))
    assert store.jobs.get(job.id).state is JobState.RUNNING
    assert len(store.jobs.page()) == 1


def test_success_submits_what_follows_in_the_same_transaction(store: Store) -> None:
    job = submit(store)
    store.jobs.claim(job.id, "worker", LEASE)
    following = Job(kind=JobKind.FINETUNE, parent=job.id)
    with store.jobs.fenced(job.id, 1) as connection:
        store.jobs.succeed(connection, job.id, {"records": 3}, following)
    assert store.jobs.get(job.id).result == {"records": 3}
    assert [child.id for child in store.jobs.page(parent=job.id)] == [following.id]
    assert following.id in [job_id for _, job_id, _ in store.jobs.due()]


def test_a_finished_job_is_never_claimed_again(store: Store) -> None:
    job = submit(store)
    store.jobs.claim(job.id, "worker", LEASE)
    with store.jobs.fenced(job.id, 1) as connection:
        store.jobs.succeed(connection, job.id, {})
    assert store.jobs.claim(job.id, "late message", LEASE) is None


def test_cancelling_a_queued_job_ends_it_at_once(store: Store) -> None:
    job = submit(store)
    assert store.jobs.cancel(job.id).state is JobState.CANCELLED
    assert store.jobs.claim(job.id, "worker", LEASE) is None
    with pytest.raises(Conflict, match="already cancelled"):
        store.jobs.cancel(job.id)


def test_a_running_job_learns_of_its_cancellation_by_its_heartbeat(store: Store) -> None:
    job = submit(store)
    store.jobs.claim(job.id, "worker", LEASE)
    assert store.jobs.heartbeat(job.id, 1, LEASE) is False
    assert store.jobs.cancel(job.id).state is JobState.RUNNING
    assert store.jobs.heartbeat(job.id, 1, LEASE) is True
    store.jobs.fail(job.id, 1, JobCancelled("Stopped on request."))
    assert store.jobs.get(job.id).state is JobState.CANCELLED


def test_the_sweeper_requeues_a_dead_workers_job(store: Store) -> None:
    job = submit(store)
    store.jobs.mark_sent([entry for entry, _, _ in store.jobs.due()])
    store.jobs.claim(job.id, "dead", EXPIRED)
    assert store.jobs.resend(unclaimed_for=timedelta(hours=1), silent_for=AT_ONCE) == [job.id]
    assert store.jobs.get(job.id).state is JobState.QUEUED
    assert [job_id for _, job_id, _ in store.jobs.due()] == [job.id]


def test_the_sweeper_sends_again_what_the_queue_forgot(store: Store) -> None:
    job = submit(store)
    store.jobs.mark_sent([entry for entry, _, _ in store.jobs.due()])
    assert store.jobs.resend(unclaimed_for=timedelta(hours=1), silent_for=AT_ONCE) == []
    assert store.jobs.resend(unclaimed_for=EXPIRED, silent_for=LEASE) == [job.id]
    assert [job_id for _, job_id, _ in store.jobs.due()] == [job.id]


def test_only_kinds_that_miss_messages_are_sent_again(store: Store) -> None:
    score, generate = submit(store, kind=JobKind.SCORE), submit(store)
    store.jobs.mark_sent([entry for entry, _, _ in store.jobs.due()])
    lost = {"unclaimed_for": EXPIRED, "silent_for": LEASE}
    assert store.jobs.resend(**lost, kinds=[]) == []
    assert store.jobs.resend(**lost, kinds=[JobKind.SCORE]) == [score.id]
    assert store.jobs.resend(**lost) == [generate.id]


def test_jobs_whose_message_was_sent_are_counted_until_somebody_claims_them(store: Store) -> None:
    first, _ = submit(store), submit(store, kind=JobKind.SCORE)
    assert store.jobs.sent() == {}
    store.jobs.mark_sent([entry for entry, _, _ in store.jobs.due()])
    submit(store)
    assert store.jobs.sent() == {JobKind.GENERATE: 1, JobKind.SCORE: 1}
    store.jobs.claim(first.id, "worker", LEASE)
    assert store.jobs.sent() == {JobKind.SCORE: 1}
    store.jobs.attempt_failed(first.id, 1, "died")
    assert store.jobs.sent() == {JobKind.SCORE: 1}, "its message is still to be sent"


def test_a_job_whose_workers_keep_dying_is_parked_with_its_reason(store: Store) -> None:
    job = submit(store)
    for _ in range(MAX_FAILURES):
        assert store.jobs.claim(job.id, "dying", EXPIRED) is not None
        store.jobs.resend(unclaimed_for=timedelta(hours=1), silent_for=AT_ONCE)
    parked = store.jobs.get(job.id)
    assert parked.state is JobState.FAILED
    assert parked.error is not None
    assert f"{MAX_FAILURES} attempts; the last: the worker's lease expired" in parked.error["detail"]


def test_events_resume_after_a_sequence_number(store: Store) -> None:
    job = submit(store)
    store.jobs.claim(job.id, "worker", LEASE)
    store.jobs.report(job.id, 1, {"done": 1, "total": 2})
    assert [event.seq for event in store.jobs.events(job.id)] == [1, 2, 3]
    assert [event.data for event in store.jobs.events(job.id, after=2)] == [{"done": 1, "total": 2}]


def test_handing_back_lets_another_attempt_begin(store: Store) -> None:
    job = submit(store)
    store.jobs.claim(job.id, "leaving", LEASE)
    store.jobs.hand_back(job.id, 1, "the worker is shutting down")
    second = store.jobs.claim(job.id, "next", LEASE)
    assert second is not None
    assert second.attempt == 2


def test_an_unknown_job_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match="GET /v1/jobs"):
        store.jobs.get("job_none")
