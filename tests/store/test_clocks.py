"""Clocks that jump by an hour, or are another machine's: who lives is alive, who is dead is found dead."""

from datetime import timedelta

import pytest
from sqlalchemy import select, update

from hscr.records import Job, JobKind, JobState, Replica, now
from hscr.store.settings import StoreSettings
from hscr.store.sightings import Sightings
from hscr.store.store import Store
from hscr.store.tables import gateways, jobs, outbox, replicas
from tests.waiting import wait_until

HOUR, LEASE, SOON = timedelta(hours=1), timedelta(seconds=30), timedelta(seconds=0.3)
JUMPS = [HOUR, -HOUR, timedelta(seconds=5), timedelta(seconds=-5)]


STAMPS = {
    jobs: ("lease_expires_at", "created_at"), outbox: ("sent_at", "created_at"), replicas: ("seen_at",),
    gateways: ("seen_at",),
}  # fmt: skip


def jump(store: Store, by: timedelta) -> None:
    """As if this process's clock, and nobody's monotonic one, had moved: all stamps are the other way."""
    with store.database.write() as connection:
        for table, names in STAMPS.items():
            for row in connection.execute(select(table)).mappings().all():
                moved = {name: row[name] and row[name] - by for name in names}
                mine = [column == row[column.name] for column in table.primary_key]
                connection.execute(update(table).where(*mine).values(**moved))


def running(store: Store) -> Job:
    job = store.jobs.submit(Job(kind=JobKind.SCORE))
    store.jobs.mark_sent([entry for entry, _, _ in store.jobs.due()])
    assert store.jobs.claim(job.id, "worker", LEASE)
    return job


@pytest.mark.parametrize("by", JUMPS)
def test_a_jump_takes_no_job_from_a_worker_that_lives(store: Store, by: timedelta) -> None:
    job = running(store)
    for _ in range(4):  # more often than a job may fail
        assert store.jobs.resend(unclaimed_for=LEASE, silent_for=LEASE) == []
        jump(store, by)
        assert store.jobs.resend(unclaimed_for=LEASE, silent_for=LEASE) == [], (
            "its worker renews it again soon"
        )
        assert store.jobs.claim(job.id, "a doubled message", LEASE) is None
        assert store.jobs.heartbeat(job.id, 1, LEASE) is False
    assert (store.jobs.get(job.id).state, store.jobs.get(job.id).attempt) == (JobState.RUNNING, 1)


@pytest.mark.parametrize("by", JUMPS)
def test_a_jump_hides_no_dead_worker(store: Store, by: timedelta) -> None:
    job = running(store)
    assert store.jobs.resend(unclaimed_for=LEASE, silent_for=SOON) == []
    jump(store, by)
    wait_until(
        lambda: store.jobs.resend(unclaimed_for=LEASE, silent_for=SOON) == [job.id], what="the finding"
    )
    assert store.jobs.get(job.id).state is JobState.QUEUED


@pytest.mark.parametrize("by", [HOUR, -HOUR])
def test_a_jump_hides_no_lost_message(store: Store, by: timedelta) -> None:
    job = store.jobs.submit(Job(kind=JobKind.SCORE))
    store.jobs.mark_sent([entry for entry, _, _ in store.jobs.due()])
    assert store.jobs.resend(unclaimed_for=LEASE, silent_for=LEASE) == []
    jump(store, by)
    assert store.jobs.resend(unclaimed_for=LEASE, silent_for=LEASE) == [job.id]
    store.jobs.mark_sent([entry for entry, _, _ in store.jobs.due()])
    assert store.jobs.resend(unclaimed_for=LEASE, silent_for=LEASE) == [], "once"


def replica(name: str) -> Replica:
    return Replica(
        id=name, address="http://127.0.0.1:9", model="m", model_digest="d", engine="e/1", numeric_mode="x",
        template_digest="t", intended_use="", loaded=("a@1",), ready=True, seen_at=now(),
    )  # fmt: skip


@pytest.mark.parametrize("by", JUMPS)
def test_a_jump_takes_no_replica_from_view_and_hides_no_dead_one(store: Store, by: timedelta) -> None:
    seen = timedelta(seconds=2)
    for name in ("dead", "alive"):
        store.releases.report_replica(replica(name))
    assert len(store.releases.replicas(seen_within=seen)) == 2
    jump(store, by)

    def names() -> list[str]:
        store.releases.report_replica(replica("alive"))
        return [each.id for each in store.releases.replicas(seen_within=seen)]

    assert "alive" in names()
    wait_until(lambda: names() == ["alive"], what="the silence being noticed")


def test_a_row_of_another_hour_is_not_trusted_at_first_sight(settings: StoreSettings, store: Store) -> None:
    store.releases.report_replica(replica("long dead"))
    for by in (HOUR, -2 * HOUR):
        jump(store, by)
        with Store.open(settings) as started_later:
            assert started_later.releases.replicas(seen_within=LEASE) == []


@pytest.mark.parametrize("by", JUMPS)
def test_a_jump_unloads_nothing_under_a_request(store: Store, by: timedelta) -> None:
    store.releases.report_replica(replica("r1"))
    store.releases.report_gateway("g1", epoch=store.releases.pointer().epoch, in_flight={"a@1": 1})
    jump(store, by)
    assert not store.releases.retire("r1", "a@1", gateways_seen=SOON), "a gateway answers with it"
    wait_until(lambda: store.releases.retire("r1", "a@1", gateways_seen=SOON), what="the dead gateway's end")


def test_what_nobody_watched_is_judged_by_its_stamp() -> None:
    sightings = Sightings()
    old = now() - HOUR
    sightings.alive({"a": now()}, LEASE)
    assert sightings.alive({"a": old}, timedelta(0)) == set(), "it may have died since the last look"
    assert sightings.alive({"a": old, "b": now()}, LEASE) == {"b"}


def test_pages_are_whole_after_the_clock_was_set_back(store: Store) -> None:
    before = [running(store).id for _ in range(3)]
    jump(store, -HOUR)
    after = [store.jobs.submit(Job(kind=JobKind.SCORE)).id for _ in range(3)]
    seen, last = [], None
    while page := store.jobs.page(limit=2, before=last):
        seen += [job.id for job in page]
        last = page[-1].created_at
    assert sorted(seen) == sorted(before + after)
    assert len(seen) == 6
