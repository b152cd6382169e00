"""A worker whose object store is away: no job fails for it, and each is done once the store is back."""

from datetime import timedelta
from pathlib import Path

import pytest

from hscr.records import Job, JobKind, JobState
from hscr.store.jobs import MAX_FAILURES
from hscr.store.store import Store
from tests.s3_server import S3Server
from workers.leases import Done, Lease, Terms, run_job
from workers.settings import WorkerSettings

TERMS = Terms(timedelta(seconds=30), heartbeat_seconds=0.05, timeout_seconds=60)


@pytest.fixture
def server(tmp_path: Path) -> S3Server:
    """One of its own."""
    folder = tmp_path / "server"
    folder.mkdir()
    return S3Server(folder)


@pytest.fixture
def settings(settings: WorkerSettings, server: S3Server) -> WorkerSettings:
    """With a bucket on that server, which has been killed since."""
    bucket = server.start().bucket()
    server.kill()
    return settings.model_copy(update=bucket)


def test_a_job_waits_for_its_object_store_without_blame(
    store: Store, server: S3Server, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights").write_bytes(b"weights")

    def body(_: Lease) -> Done:
        return Done({"digest": store.blobs.put_folder(adapter)})

    job = store.jobs.submit(Job(kind=JobKind.SCORE))
    store.jobs.mark_sent([entry for entry, _, _ in store.jobs.due()])
    for _ in range(MAX_FAILURES + 1):
        run_job(store, job.id, body, TERMS)
        assert store.jobs.get(job.id).state is JobState.QUEUED
    reason = store.jobs.events(job.id)[-1].data["reason"]
    assert reason.startswith("The object store did not answer")
    assert store.jobs.due() == [], "not at once"
    assert store.jobs.resend(unclaimed_for=timedelta(seconds=-1), silent_for=TERMS.lease) == [job.id]
    server.start()
    try:
        run_job(store, job.id, body, TERMS)
        ended = store.jobs.get(job.id)
        assert (ended.state, ended.error) == (JobState.SUCCEEDED, None)
        assert store.blobs.holds_folder((ended.result or {})["digest"])
    finally:
        server.kill()
