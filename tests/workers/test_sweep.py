"""What the sweeper brings back and what it throws away."""

import os
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import redis
from celery import Celery

from hscr.errors import HscrError
from hscr.records import AdapterVersion, Job, JobKind, JobState
from hscr.store.answers import hold_image
from hscr.store.releases import add_adapter
from hscr.store.store import Store
from tests.waiting import wait_until
from workers.broker import build
from workers.contract import ReleasePayload
from workers.gpu import Gpu
from workers.outbox import send_due
from workers.services import Services
from workers.settings import WorkerSettings
from workers.sweep import sweep


@pytest.fixture
def services(settings: WorkerSettings, store: Store) -> Services:
    changed = settings.model_copy(update={"unclaimed_seconds": 0.2, "lease_seconds": 0.2})
    return Services(changed, store, Gpu(changed))


@pytest.fixture
def app(settings: WorkerSettings) -> Celery:
    return build(settings)


def test_a_dead_workers_job_is_sent_again(services: Services, app: Celery) -> None:
    jobs = services.store.jobs
    job = jobs.submit(Job(kind=JobKind.SCORE))
    jobs.mark_sent([entry for entry, _, _ in jobs.due()])
    jobs.claim(job.id, "a worker that dies", timedelta(seconds=0.1))

    def swept() -> bool:
        sweep(services, app)
        return bool(jobs.due())

    wait_until(swept, seconds=5)
    assert jobs.get(job.id).state is JobState.QUEUED


def test_a_lost_message_is_sent_again(services: Services, app: Celery) -> None:
    jobs = services.store.jobs
    job = jobs.submit(Job(kind=JobKind.SCORE))
    jobs.mark_sent([entry for entry, _, _ in jobs.due()])
    sweep(services, app)
    assert jobs.due() == []

    def swept() -> bool:
        sweep(services, app)
        return [entry[1] for entry in jobs.due()] == [job.id]

    wait_until(swept, seconds=5)


def test_a_long_queue_is_not_made_longer_and_what_it_lost_is_found(
    services: Services, app: Celery, settings: WorkerSettings
) -> None:
    jobs, queue = services.store.jobs, redis.Redis.from_url(settings.redis_url)
    waiting = [jobs.submit(Job(kind=JobKind.SCORE)).id for _ in range(3)]
    other = jobs.submit(Job(kind=JobKind.GENERATE)).id
    at_once = services.settings.model_copy(update={"unclaimed_seconds": 1e-9})
    services = replace(services, settings=at_once)
    assert send_due(services.store, app) == 4
    for _ in range(3):
        sweep(services, app)
    assert jobs.due() == [], "each has its message still"

    queue.rpop("score")
    sweep(services, app)
    assert sorted(job_id for _, job_id, _ in jobs.due()) == sorted(waiting), "nobody knows which it was"
    send_due(services.store, app)
    sweep(services, app)
    assert (jobs.due(), queue.llen("score")) == ([], 5), "once"

    queue.flushdb()
    sweep(services, app)
    assert sorted(job_id for _, job_id, _ in jobs.due()) == sorted([*waiting, other])


def test_expired_images_go_and_shared_ones_stay(services: Services, app: Celery) -> None:
    store = services.store
    mine, shared = store.blobs.put(b"mine"), store.blobs.put(b"shared")
    with store.database.write() as connection:
        hold_image(connection, mine, "study-1", timedelta(seconds=-1))
        hold_image(connection, shared, "study-1", timedelta(seconds=-1))
        hold_image(connection, shared, "study-2", None)
    sweep(services, app)
    assert (store.blobs.exists(mine), store.blobs.exists(shared)) == (False, True)


def test_scratch_of_attempts_that_are_over_goes(services: Services, app: Celery) -> None:
    store = services.store
    job = store.jobs.submit(Job(kind=JobKind.FINETUNE))
    store.jobs.claim(job.id, "worker", timedelta(seconds=30))
    running, over, unknown = f"{job.id}.1", f"{job.id}.0", "job_unknown.1"
    for name in (running, over, unknown):
        folder = services.settings.work / name
        folder.mkdir(parents=True)
        (folder / "records.jsonl").write_text("{}")
    sweep(services, app)
    assert [folder.name for folder in services.settings.work.iterdir()] == [running]


def test_forgotten_uploads_go_and_fresh_ones_stay(services: Services, app: Celery) -> None:
    aside = services.store.blobs.root / "aside"
    aside.mkdir(parents=True)
    old, fresh = aside / "old", aside / "fresh"
    for file in (old, fresh):
        file.write_bytes(b"half")
    day = time.time() - services.settings.keep_temporary_seconds - 1
    os.utime(old, (day, day))
    sweep(services, app)
    assert list(aside.iterdir()) == [fresh]


def test_a_candidate_is_dropped_when_no_release_of_it_goes_on(services: Services, app: Celery) -> None:
    releases, jobs = services.store.releases, services.store.jobs
    version = AdapterVersion(
        name="a@1", digest="1" * 64, base_digest="b", job_id="j", config={}, records=1, records_digest="r"
    )
    with services.store.database.write() as connection:
        add_adapter(connection, version, [])
    payload = ReleasePayload(version_name="a@1", actor="a", reason="r").stored()
    job = jobs.submit(Job(kind=JobKind.RELEASE, payload=payload))
    releases.propose("a@1", actor="a", reason="r")
    sweep(services, app)
    assert releases.pointer().candidate == "a@1", "its release waits"
    jobs.claim(job.id, "w", timedelta(minutes=1))
    sweep(services, app)
    assert releases.pointer().candidate == "a@1", "its release runs"
    jobs.fail(job.id, 1, HscrError("over"))
    sweep(services, app)
    assert releases.pointer().candidate is None
    epoch = releases.pointer().epoch
    sweep(services, app)
    assert releases.pointer().epoch == epoch, "once"
