"""A worker whose disk is full: no job fails for it, none is lost, and each is done once there is space."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection

from hscr.errors import HscrError
from hscr.records import Job, JobKind, JobState
from hscr.store.jobs import MAX_FAILURES
from hscr.store.releases import add_dependence
from hscr.store.store import Store
from tests.full_disk import SmallDisk, small_disk
from tests.workers.harness import migrated
from workers.leases import Done, Lease, Terms, run_job
from workers.settings import WorkerSettings

TERMS = Terms(timedelta(seconds=30), heartbeat_seconds=0.05, timeout_seconds=60)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "home" / "blobs", megabytes=2) as mounted:
        yield mounted


def opened(home: Path, reserve: int) -> Store:
    return Store.open(migrated(WorkerSettings(home=home, min_free_bytes=reserve)))


def queued(store: Store) -> Job:
    return store.jobs.submit(Job(kind=JobKind.SCORE))


def publishes(store: Store, weights: Path) -> Callable[[Lease], Done]:
    def body(_: Lease) -> Done:
        return Done({"digest": store.blobs.put_folder(weights)})

    return body


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes(bytes(500_000))
    return folder


def test_what_cannot_be_published_is_tried_again_without_blame(
    disk: SmallDisk, tmp_path: Path, weights: Path
) -> None:
    with opened(tmp_path / "home", reserve=0) as store:
        job = queued(store)
        with disk.full():
            for _ in range(5):  # more often than a job may fail
                run_job(store, job.id, publishes(store, weights), TERMS)
                assert store.jobs.get(job.id).state is JobState.QUEUED
            assert not (store.blobs.root / "folders").exists()
        run_job(store, job.id, publishes(store, weights), TERMS)
        ended = store.jobs.get(job.id)
        assert (ended.state, ended.error) == (JobState.SUCCEEDED, None)
        assert store.blobs.folder((ended.result or {})["digest"])


def test_nothing_is_begun_without_space_and_the_message_comes_again(disk: SmallDisk, tmp_path: Path) -> None:
    with opened(tmp_path / "home", reserve=1_000_000) as store:
        job = queued(store)
        store.jobs.mark_sent([entry for entry, _, _ in store.jobs.due()])
        with disk.full():
            run_job(store, job.id, lambda _: pytest.fail("it was begun"), TERMS)
        assert (store.jobs.get(job.id).state, store.jobs.get(job.id).attempt) == (JobState.QUEUED, 0)
        assert store.jobs.resend(unclaimed_for=timedelta(seconds=-1), silent_for=TERMS.lease) == [job.id]
        run_job(store, job.id, lambda _: Done({}), TERMS)
        assert store.jobs.get(job.id).state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("error", "attempts"),
    [(HscrError("what the child says"), 1), (OSError(28, "No space left on device"), MAX_FAILURES)],
)
def test_whatever_fails_on_a_full_disk_is_tried_again(
    disk: SmallDisk, tmp_path: Path, error: Exception, attempts: int
) -> None:
    """A child on the same disk tells of it in its own words. With space it is the job's own failure."""
    with opened(tmp_path / "home", reserve=1_000_000) as store:
        job, filler = queued(store), disk.folder / "filler"

        def fills_and_fails(_: Lease) -> Done:
            filler.write_bytes(bytes(1_500_000))
            raise error

        def fails(_: Lease) -> Done:
            raise error

        run_job(store, job.id, fills_and_fails, TERMS)
        assert store.jobs.get(job.id).state is JobState.QUEUED
        filler.unlink()
        for _ in range(attempts):
            assert store.jobs.get(job.id).state is JobState.QUEUED
            run_job(store, job.id, fails, TERMS)
        assert store.jobs.get(job.id).state is JobState.FAILED


def test_a_database_without_space_leaves_the_job_to_its_lease(tmp_path: Path) -> None:
    """Neither the result nor the failure can be written; what was accepted is still there afterwards."""
    with small_disk(tmp_path / "disk", megabytes=4) as disk, opened(disk.folder / "home", reserve=0) as store:
        job, filled = queued(store), ExitStack()

        def fills(_: Lease) -> Done:
            filled.enter_context(disk.full())
            return Done({}, write=many_rows)

        def many_rows(connection: Connection) -> None:
            add_dependence(connection, job.id, None, {"body": "x" * 100_000})

        run_job(store, job.id, fills, TERMS)
        assert store.jobs.get(job.id).state is JobState.RUNNING
        assert store.releases.dependence(job.id) == {}
        filled.close()
        store.jobs.hand_back(job.id, 1, "as the sweeper does")
        run_job(store, job.id, lambda _: Done({}, write=many_rows), TERMS)
        assert store.jobs.get(job.id).state is JobState.SUCCEEDED
