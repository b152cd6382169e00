"""`kill -9` of each process at the worst moment: the loop completes, nothing lost, nothing twice."""

import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hscr.config import FinetuneConfig
from hscr.records import JobKind, JobState, PreferenceRecord, PreferenceSource
from hscr.store.store import Store
from tests.redis_server import RedisServer
from tests.waiting import wait_until
from tests.workers.harness import (
    RANDOM,
    Processes,
    add_sources,
    finished,
    gpu_child,
    make_records,
    progress,
    states,
    submit,
    succeeded,
)
from workers.contract import FinetunePayload, GeneratePayload, ReleasePayload
from workers.gpu import Event, Gpu
from workers.settings import WorkerSettings

EPOCH = datetime.fromtimestamp(0, UTC)
GPU = "generate,score,finetune"
SMALL = FinetuneConfig(rank=4, epochs=30, batch_size=8)


def test_the_worker_dies_in_the_middle_of_a_generation(
    store: Store, processes: Processes, settings: WorkerSettings
) -> None:
    sources = add_sources(store, 800)
    processes.relay()
    processes.worker("control")
    processes.beat()
    first = processes.worker(GPU)
    job = submit(store, GeneratePayload(config=RANDOM))
    wait_until(lambda: progress(store, job) > 0, seconds=90, what="the first records")
    first.kill()
    before = {record.id for record in store.preferences.page(limit=1000)}
    assert 0 < len(before) < 800, "killed in the middle"

    processes.worker(GPU)
    ended = succeeded(store, job, seconds=120)

    assert states(store, job) == ["queued", "running", "queued", "running", "succeeded"]
    records = store.preferences.page(limit=1000)
    skipped = store.preferences.skipped(job.id)
    assert before <= {record.id for record in records}
    made = [record.source for record in records]
    assert len(made) == len(set(made)), "no source twice"
    assert set(made) | skipped.keys() == {source.id for source in sources}, "no source lost"
    assert ended.result == {"records": len(made), "skipped": len(skipped), "adapter": None}
    whole = {record.id: said(record) for record in uninterrupted(settings, sources)}
    assert {record.id: said(record) for record in records} == whole, "as if it had never died"


def said(record: PreferenceRecord) -> PreferenceRecord:
    """Without who made it and when."""
    return record.but(job_id=None, created_at=EPOCH)


def uninterrupted(settings: WorkerSettings, sources: list[PreferenceSource]) -> list[PreferenceRecord]:
    """What a child makes of all of them in one go."""
    events: list[Event] = []
    gpu = Gpu(settings)
    dumped = [source.model_dump(mode="json") for source in sources]
    arguments = {"sources": dumped, "config": RANDOM.resolved(), "adapter": None}
    gpu.run("generate", arguments, on_event=events.append, check=lambda: None)
    gpu.close()
    return [PreferenceRecord.model_validate(e["record"]) for e in events if e["event"] == "record"]


def test_the_child_dies_in_the_middle_of_a_finetune(
    store: Store, processes: Processes, settings: WorkerSettings
) -> None:
    make_records(store, 16)
    processes.relay()
    worker = processes.worker(GPU)
    job = submit(store, FinetunePayload(config=SMALL, method="random", evaluate=None))
    wait_until(lambda: progress(store, job) > 0, seconds=90, what="the first step")
    child = gpu_child(worker.pid)
    assert child is not None
    os.kill(child, signal.SIGKILL)

    ended = succeeded(store, job, seconds=120)

    assert states(store, job) == ["queued", "running", "queued", "running", "succeeded"]
    versions = store.releases.adapters()
    assert [version.name for version in versions] == [(ended.result or {})["adapter"]]
    assert versions[0].records == 16
    assert len(store.releases.trained_on(versions[0].name)) == 16
    assert store.blobs.folder(versions[0].digest)
    assert list(settings.work.iterdir()) == [], "no scratch is left"

    same = succeeded(store, submit(store, FinetunePayload(config=SMALL, method="random", evaluate=None)))
    assert (same.result or {})["adapter"] == versions[0].name, "the same records make the same bytes"
    assert len(store.releases.adapters()) == 1


def test_a_finetune_is_refused_cancelled_and_handed_back(store: Store, processes: Processes) -> None:
    """Too few records are a clear failure; a cancel works within 10 s; SIGTERM leaves the job for another."""
    processes.relay()
    worker = processes.worker(GPU)
    endless = FinetunePayload(
        config=SMALL.model_copy(update={"epochs": 10_000.0}), method="random", evaluate=None
    )
    make_records(store, 7)
    refused = finished(store, submit(store, endless))
    assert refused.state is JobState.FAILED
    assert "7 live consented records" in (refused.error or {})["detail"]
    assert "generate job" in (refused.error or {})["remedy"]

    make_records(store, 16)
    cancelled, interrupted = submit(store, endless), submit(store, endless)
    wait_until(lambda: progress(store, cancelled) > 0, seconds=90, what="the first step")
    child = gpu_child(worker.pid)
    store.jobs.cancel(cancelled.id)
    assert finished(store, cancelled, seconds=10).state is JobState.CANCELLED
    assert store.releases.adapters() == []

    wait_until(lambda: progress(store, interrupted) > 0, seconds=60, what="the first step")
    assert gpu_child(worker.pid) == child, "the child stayed warm"
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    assert store.jobs.get(interrupted.id).state is JobState.QUEUED
    assert child is not None
    assert not Path(f"/proc/{child}").exists()


@pytest.fixture
def own_redis(tmp_path: Path, settings: WorkerSettings) -> Iterator[RedisServer]:
    """A queue that forgets everything when it dies."""
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder, durable=False).start()
    settings.redis_url = server.url()
    yield server
    server.kill()


def test_redis_dies_between_submit_and_start(
    store: Store, own_redis: RedisServer, processes: Processes
) -> None:
    """Its message is gone with it; the worker that was connected finds the new one by itself."""
    processes.relay()
    job = submit(store, ReleasePayload(version_name=None, actor="a", reason="r"))
    wait_until(lambda: not store.jobs.due(), what="the message being sent")
    own_redis.kill()
    own_redis.start()
    assert own_redis.client().llen("control") == 0
    own_redis.kill()
    during = submit(store, ReleasePayload(version_name=None, actor="a", reason="r"))
    own_redis.start()

    processes.worker("control", concurrency=2)
    processes.beat()
    for each in (job, during):
        assert succeeded(store, each, seconds=60).attempt == 1

    own_redis.kill()
    own_redis.start()
    after = submit(store, ReleasePayload(version_name=None, actor="a", reason="r"))
    assert succeeded(store, after, seconds=60).attempt == 1


def test_a_doubled_message_runs_the_job_once(store: Store, processes: Processes) -> None:
    job = submit(store, ReleasePayload(version_name=None, actor="a", reason="r"))
    with store.database.write() as connection:
        query = "INSERT INTO outbox (job_id, kind, created_at) SELECT job_id, kind, created_at FROM outbox"
        connection.exec_driver_sql(query)
    processes.relay()
    processes.worker("control")
    last = submit(store, ReleasePayload(version_name=None, actor="a", reason="last"))
    succeeded(store, last)
    assert states(store, job) == ["queued", "running", "succeeded"]
    assert len(store.jobs.page(kind=JobKind.RELEASE)) == 2
