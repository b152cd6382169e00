"""What the sweeper brings back and what it throws away."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from hscr.errors import HscrError
from hscr.records import AdapterVersion, Job, JobKind, JobState
from hscr.store.answers import hold_image
from hscr.store.releases import add_adapter
from hscr.store.store import Store
from tests.waiting import wait_until
from tests.workers.engines import register
from workers.contract import ReleasePayload
from workers.gpu import Gpu
from workers.services import Services
from workers.settings import EMBEDDED_MODEL, WorkerSettings
from workers.sweep import sweep


@pytest.fixture
def services(settings: WorkerSettings, store: Store) -> Services:
    changed = settings.model_copy(update={"unclaimed_seconds": 0.2})
    return Services(changed, store, Gpu(changed))


def test_a_dead_workers_job_is_sent_again(services: Services) -> None:
    jobs = services.store.jobs
    job = jobs.submit(Job(kind=JobKind.SCORE))
    jobs.mark_sent([entry for entry, _, _ in jobs.due()])
    jobs.claim(job.id, "a worker that dies", timedelta(seconds=0.1))

    def swept() -> bool:
        sweep(services)
        return bool(jobs.due())

    wait_until(swept, seconds=5)
    assert jobs.get(job.id).state is JobState.QUEUED


def test_a_lost_message_is_sent_again(services: Services) -> None:
    jobs = services.store.jobs
    job = jobs.submit(Job(kind=JobKind.SCORE))
    jobs.mark_sent([entry for entry, _, _ in jobs.due()])
    sweep(services)
    assert jobs.due() == []

    def swept() -> bool:
        sweep(services)
        return [entry[1] for entry in jobs.due()] == [job.id]

    wait_until(swept, seconds=5)


def test_expired_images_go_and_shared_ones_stay(services: Services) -> None:
    store = services.store
    mine, shared = store.blobs.put(b"mine"), store.blobs.put(b"shared")
    with store.database.write() as connection:
        hold_image(connection, mine, "study-1", timedelta(seconds=-1))
        hold_image(connection, shared, "study-1", timedelta(seconds=-1))
        hold_image(connection, shared, "study-2", None)
    sweep(services)
    assert (store.blobs.exists(mine), store.blobs.exists(shared)) == (False, True)


def test_scratch_of_attempts_that_are_over_goes(services: Services) -> None:
    store = services.store
    job = store.jobs.submit(Job(kind=JobKind.FINETUNE))
    store.jobs.claim(job.id, "worker", timedelta(seconds=30))
    running, over, unknown = f"{job.id}.1", f"{job.id}.0", "job_unknown.1"
    for name in (running, over, unknown):
        folder = services.settings.work / name
        folder.mkdir(parents=True)
        (folder / "records.jsonl").write_text("{}")
    sweep(services)
    assert [folder.name for folder in services.settings.work.iterdir()] == [running]


def test_forgotten_uploads_go_and_fresh_ones_stay(services: Services) -> None:
    aside = services.store.blobs.root / "aside"
    aside.mkdir(parents=True)
    old, fresh = aside / "old", aside / "fresh"
    for file in (old, fresh):
        file.write_bytes(b"half")
    day = time.time() - services.settings.keep_temporary_seconds - 1
    os.utime(old, (day, day))
    sweep(services)
    assert list(aside.iterdir()) == [fresh]


def test_files_that_no_row_names_go_once_they_are_old(services: Services, folders: list[Path]) -> None:
    """Their writer died before its commit. One that is written again is young again."""
    store = services.store
    version = register(store, EMBEDDED_MODEL, folders[0], {})
    held, left, again = (store.blobs.put(name) for name in (b"held", b"left", b"again"))
    lost, anew = (store.blobs.put_folder(folder) for folder in folders[1:])
    with store.database.write() as connection:
        hold_image(connection, held, "study-1", None)
    day = time.time() - services.settings.keep_temporary_seconds - 1
    for path in store.blobs.paths():
        os.utime(path, (day, day))
    young = {store.blobs.put(b"again"), store.blobs.put_folder(folders[2]), store.blobs.put(b"new")}
    assert {again, anew} < young

    sweep(services)

    assert {path.name for path in store.blobs.paths()} == {version.digest, held} | young
    assert not {left, lost} & young


def test_a_candidate_is_dropped_when_no_release_of_it_goes_on(services: Services) -> None:
    releases, jobs = services.store.releases, services.store.jobs
    version = AdapterVersion(
        name="a@1", digest="1" * 64, base_digest="b", job_id="j", config={}, records=1, records_digest="r"
    )
    with services.store.database.write() as connection:
        add_adapter(connection, version, [])
    payload = ReleasePayload(version_name="a@1", actor="a", reason="r").stored()
    job = jobs.submit(Job(kind=JobKind.RELEASE, payload=payload))
    releases.propose("a@1", actor="a", reason="r")
    sweep(services)
    assert releases.pointer().candidate == "a@1", "its release waits"
    jobs.claim(job.id, "w", timedelta(minutes=1))
    sweep(services)
    assert releases.pointer().candidate == "a@1", "its release runs"
    jobs.fail(job.id, 1, HscrError("over"))
    sweep(services)
    assert releases.pointer().candidate is None
    epoch = releases.pointer().epoch
    sweep(services)
    assert releases.pointer().epoch == epoch, "once"
