"""Writers at the same time: the second begins before the first has committed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import pytest
from sqlalchemy import Connection, delete, event, func, select, text, update

from hscr.errors import Conflict, Gone
from hscr.records import Job, JobKind, JobState
from hscr.store.answers import hold_image
from hscr.store.database import WRITE
from hscr.store.jobs import Asked, submit_in
from hscr.store.keys import claim_idempotency
from hscr.store.preferences import add_skip, add_source
from hscr.store.releases import add_adapter, add_dependence, promote_in
from hscr.store.store import Store
from hscr.store.tables import images, jobs, pointer, replicas
from hscr.store.writers import removing
from tests.store.make import answer, source
from tests.store.test_releases import SEEN, WHO, adapter, promote, register, replica
from tests.waiting import wait_until

T = TypeVar("T")
LEASE = timedelta(seconds=30)
EXPIRED = timedelta(seconds=-1)


def overlapping(store: Store, first: Callable[[Connection], object], second: Callable[[], T]) -> T:
    """The second's result, which began between the first's last write and its commit."""
    with ThreadPoolExecutor(1) as pool:
        with store.database.write() as connection, writers(store) as come:
            first(connection)
            begun = pool.submit(second)
            wait_until(lambda: begun.done() or waits(store, come), what="the second writer waiting, or done")
        return begun.result()


@contextmanager
def writers(store: Store) -> Iterator[list[Connection]]:
    """The connections that come inside the block to the BEGIN of a write."""
    come: list[Connection] = []

    def note(connection: Connection, options: Mapping[str, object]) -> None:
        if options.get(WRITE):
            come.append(connection)

    event.listen(store.database._engine, "set_connection_execution_options", note)
    try:
        yield come
    finally:
        event.remove(store.database._engine, "set_connection_execution_options", note)


def waits(store: Store, come: Sequence[Connection]) -> bool:
    """Whether a writer waits for another; on SQLite every second one does, from its BEGIN on."""
    with store.database.read() as connection:
        if connection.dialect.name == "sqlite":
            return bool(come)
        waiting = "wait_event_type = 'Lock' AND datname = current_database()"
        query = text(f"SELECT count(*) FROM pg_stat_activity WHERE {waiting}")
        return bool(connection.execute(query).scalar_one())


def running(store: Store, lease: timedelta = LEASE) -> Job:
    job = store.jobs.submit(Job(kind=JobKind.GENERATE))
    assert store.jobs.claim(job.id, "worker", lease) is not None
    return job


def test_a_repeated_request_gets_the_job_that_the_first_is_still_writing(store: Store) -> None:
    job = Job(kind=JobKind.GENERATE)

    def first(connection: Connection) -> None:
        assert claim_idempotency(connection, "local", "key", "digest", job.id) is None
        submit_in(connection, job)

    again = Job(kind=JobKind.GENERATE)
    assert overlapping(store, first, lambda: store.jobs.submit(again, idempotency=("key", "digest"))) == job
    assert store.jobs.page() == [job]


def test_of_eight_equal_requests_one_makes_a_job(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        submitted = pool.map(
            lambda _: store.jobs.submit(Job(kind=JobKind.GENERATE), idempotency=("key", "digest")), range(8)
        )
        assert len({job.id for job in submitted}) == 1
    assert len(store.jobs.page()) == 1


def test_requests_that_two_gateways_get_in_opposite_order_make_each_job_once(store: Store) -> None:
    def submitted(order: int) -> set[str]:
        keys = [f"key-{n}" for n in range(60)][::order]
        asked = [Asked(Job(kind=JobKind.GENERATE), (key, "digest")) for key in keys]
        return {outcome.id for outcome in store.jobs.submit_all(asked) if isinstance(outcome, Job)}

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(submitted, [1, -1] * 20))
    assert {len(ids) for ids in answers} == {60}
    assert len(set.union(*answers)) == 60
    assert len(store.jobs.page(limit=200)) == 60


def test_a_job_that_ends_while_it_is_cancelled_has_ended(store: Store) -> None:
    job = running(store)
    with pytest.raises(Conflict, match="already succeeded"):
        overlapping(
            store,
            lambda connection: store.jobs.succeed(connection, job.id, {"n": 1}),
            lambda: store.jobs.cancel(job.id),
        )
    assert store.jobs.get(job.id).result == {"n": 1}


def test_a_job_whose_worker_writes_right_now_is_not_taken_from_it(store: Store) -> None:
    job = running(store, EXPIRED)

    def renewed(connection: Connection) -> None:
        lease = store.jobs.get(job.id).created_at + timedelta(hours=1)
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(lease_expires_at=lease))

    assert (
        overlapping(store, renewed, lambda: store.jobs.resend(unclaimed_for=LEASE, silent_for=timedelta(0)))
        == []
    )
    assert store.jobs.get(job.id).state is JobState.RUNNING


def test_sweepers_at_once_send_each_dead_workers_job_again_once(store: Store) -> None:
    dead = sorted(running(store, EXPIRED).id for _ in range(20))
    with ThreadPoolExecutor(4) as pool:
        swept = list(
            pool.map(lambda _: store.jobs.resend(unclaimed_for=LEASE, silent_for=timedelta(0)), range(4))
        )
    assert sorted(job_id for ids in swept for job_id in ids) == dead
    for job_id in dead:
        told = [event.data["state"] for event in store.jobs.events(job_id)]
        assert told == ["queued", "running", "queued"]


def test_nothing_is_left_of_what_came_while_its_study_was_deleted(store: Store) -> None:
    def first(connection: Connection) -> None:
        hold_image(connection, "i", "st", None)
        add_source(connection, source("s1"))

    adapters, unreferenced = overlapping(store, first, lambda: store.preferences.delete_study("st", "key_1"))
    assert (adapters, unreferenced) == ([], ["i"])
    assert store.preferences.sources(["s1"]) == []


def test_an_answer_that_comes_while_its_study_is_deleted_is_refused(store: Store) -> None:
    with pytest.raises(Gone):
        overlapping(
            store,
            lambda connection: (removing(connection), _bury(connection)),
            lambda: store.answers.add(answer("a1"), image_ttl=None),
        )
    with store.database.read() as connection:
        assert connection.execute(select(func.count()).select_from(images)).scalar_one() == 0


def _bury(connection: Connection) -> None:
    connection.execute(text("INSERT INTO tombstones VALUES ('st', 'key_1', '[]', '2026-01-01 00:00:00')"))


def test_an_image_does_not_expire_under_a_new_reference(store: Store) -> None:
    with store.database.write() as connection:
        hold_image(connection, "i", "old", EXPIRED)
    expired = overlapping(
        store, lambda connection: hold_image(connection, "i", "new", None), store.answers.expire_images
    )
    assert expired == []


def test_references_to_one_image_at_once_keep_the_longest(store: Store) -> None:
    hour = timedelta(hours=1)

    def second(ttl: timedelta | None) -> None:
        with store.database.write() as connection:
            hold_image(connection, "i", "st", ttl)

    overlapping(store, lambda connection: hold_image(connection, "i", "st", hour), lambda: second(None))
    overlapping(store, lambda connection: hold_image(connection, "i", "st", hour), lambda: second(hour))
    with store.database.read() as connection:
        assert connection.execute(select(images.c.expires_at)).scalars().all() == [None]


def test_a_version_that_is_being_promoted_is_not_retired(store: Store) -> None:
    register(store, "a@1")
    store.releases.report_replica(replica("r1", "a@1"))
    assert not overlapping(
        store,
        lambda connection: promote_in(connection, "a@1", replicas_seen=SEEN, **WHO),
        lambda: store.releases.retire("r1", "a@1", gateways_seen=SEEN),
    )
    assert store.releases.replicas(seen_within=SEEN)[0].loaded == ("a@1",)


def test_a_version_that_is_being_retired_is_not_promoted(store: Store) -> None:
    register(store, "a@1")
    store.releases.report_replica(replica("r1", "a@1"))

    def retired(connection: Connection) -> None:
        connection.execute(select(pointer).with_for_update())
        connection.execute(update(replicas).values(body=replica("r1").model_dump(mode="json")))

    with pytest.raises(Conflict, match="not loaded on r1"):
        overlapping(store, retired, lambda: promote(store, "a@1"))


def test_a_lease_waits_for_a_retirement_under_way(store: Store) -> None:
    register(store, "a@1")
    store.releases.report_replica(replica("r1", "a@1"))

    def retired(connection: Connection) -> None:
        connection.execute(select(pointer).with_for_update())
        connection.execute(delete(replicas))

    def leased() -> int:
        store.releases.lease_version("job_1/1", "a@1", LEASE)
        return len(store.releases.replicas(seen_within=SEEN))

    assert overlapping(store, retired, leased) == 0, "whoever leased a version sees that it is gone"


def test_a_rollback_during_a_release_goes_back_from_it(store: Store) -> None:
    for name in ("a@1", "b@2"):
        register(store, name)
    store.releases.report_replica(replica("r1", "a@1", "b@2"))
    promote(store, "a@1")
    back = overlapping(
        store,
        lambda connection: promote_in(connection, "b@2", replicas_seen=SEEN, **WHO),
        lambda: store.releases.rollback(**WHO),
    )
    assert (back.active, back.previous, back.epoch) == ("a@1", "b@2", 3)


WRITES: dict[str, Callable[[Connection], object]] = {
    "adapter": lambda connection: add_adapter(connection, adapter("a@1"), []),
    "skipped source": lambda connection: add_skip(connection, "s1", "c", "job_1", "no image"),
    "scores": lambda connection: add_dependence(connection, "job_1", None, {}),
    "source": lambda connection: add_source(connection, source("s1")),
}


@pytest.mark.parametrize("what", WRITES)
def test_what_two_write_at_once_is_there_once(store: Store, what: str) -> None:
    def second() -> None:
        with store.database.write() as connection:
            WRITES[what](connection)

    overlapping(store, WRITES[what], second)


def test_a_reader_sees_one_state_however_long_it_looks(store: Store) -> None:
    with store.database.read() as connection:
        count = select(func.count()).select_from(jobs)
        before = connection.execute(count).scalar_one()
        store.jobs.submit(Job(kind=JobKind.GENERATE))
        assert connection.execute(count).scalar_one() == before
    assert len(store.jobs.page()) == before + 1
