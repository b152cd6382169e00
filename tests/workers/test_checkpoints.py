"""A fine-tune that was interrupted goes on where it was, wherever; and only where that is sound."""

import os
import signal
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from celery import Celery

from hscr.config import FinetuneConfig
from hscr.errors import HscrError, LeaseLost
from hscr.records import Job, JobKind, JobState
from hscr.store.store import Store
from tests.s3_server import S3Server
from tests.waiting import wait_until
from tests.workers.harness import Processes, gpu_child, make_records, progress, states, submit, succeeded
from workers.broker import build
from workers.checkpoints import Kept, drop_ended, drop_handed_over
from workers.contract import FinetunePayload
from workers.leases import Lease, Terms
from workers.outbox import send_due
from workers.settings import WorkerSettings

GPU = "generate,score,finetune"
# Of 160 steps, so that an interruption is one in the middle.
LONG = FinetunePayload(config=FinetuneConfig(rank=4, epochs=80, batch_size=8), method="random", evaluate=None)
NEVER = "1000000"


@pytest.fixture
def settings(settings: WorkerSettings, request: pytest.FixtureRequest) -> WorkerSettings:
    """On a disk that all workers share, or on a bucket where a test wants one."""
    if getattr(request, "param", None) != "bucket":
        return settings
    s3: S3Server = request.getfixturevalue("s3")
    return settings.model_copy(update={"database_url": settings.database, **s3.bucket()})


def checkpoint(store: Store, job: Job) -> Path | None:
    """Its folder, once it is whole."""
    kept = store.blobs.root / "checkpoints" / job.id
    return next((manifest.parent for manifest in kept.glob("*/steps/checkpoint-*/manifest.json")), None)


def step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def told(store: Store, job: Job) -> list[str]:
    return [event.data["message"] for event in store.jobs.events(job.id) if event.type == "log"]


def resumed_at(store: Store, job: Job) -> int | None:
    events = store.jobs.events(job.id)
    return next((event.data["resumed_at"] for event in events if "resumed_at" in event.data), None)


def kill_child(worker_pid: int) -> None:
    child = gpu_child(worker_pid)
    assert child is not None
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("settings", ["shared disk", "bucket"], indirect=True)
def test_a_killed_fine_tune_goes_on_to_the_same_bytes(
    store: Store, processes: Processes, tmp_path: Path, settings: WorkerSettings
) -> None:
    """`kill -9` of the worker and of its child; another worker, which shares the blobs alone, goes on."""
    make_records(store, 16)
    processes.relay()
    homes = [settings.home] * 2 if settings.blobs_url is None else [tmp_path / "one", tmp_path / "two"]
    first = processes.worker(GPU, HSCR_CHECKPOINT_EVERY="10", HSCR_HOME=str(homes[0]))
    job = submit(store, LONG)
    found = store.blobs.handed_over if settings.blobs_url else partial(checkpoint, store, job)
    wait_until(found, seconds=120, what="the first checkpoint")
    kill_child(first.pid)
    first.kill()
    terms = {"unclaimed_for": timedelta(hours=1), "silent_for": timedelta(seconds=5)}
    wait_until(lambda: store.jobs.resend(**terms), what="the lease's end")
    if settings.blobs_url:
        assert store.blobs.take_over(job.id, store.blobs.root / "checkpoints" / job.id / "0")
    left = checkpoint(store, job)
    assert left is not None

    processes.worker(GPU, HSCR_CHECKPOINT_EVERY="10", HSCR_HOME=str(homes[1]))
    ended = succeeded(store, job, seconds=180)

    assert states(store, job) == ["queued", "running", "queued", "running", "succeeded"]
    assert resumed_at(store, job) == step(left)
    assert told(store, job) == [f"Resumed at step {step(left)}."]
    wait_until(lambda: not (homes[1] / "blobs" / "checkpoints" / job.id).exists(), what="its removal")
    drop_handed_over(store)
    assert store.blobs.handed_over() == []

    whole = submit(store, LONG)
    same = succeeded(store, whole, seconds=180)
    assert resumed_at(store, whole) is None
    # The version's name is the digest of its bytes.
    assert same.result == ended.result


def test_only_a_sound_checkpoint_of_the_same_records_is_gone_on_from(
    store: Store, processes: Processes, settings: WorkerSettings
) -> None:
    """SIGTERM writes one, and it is used; a damaged one is not, nor one that knows a deleted record."""
    make_records(store, 16)
    app = build(settings)
    leaving = processes.worker(GPU, HSCR_CHECKPOINT_EVERY=NEVER)
    damaged = begun(store, app, LONG)
    done = progress(store, damaged)
    assert checkpoint(store, damaged) is None
    leaving.send_signal(signal.SIGTERM)
    assert leaving.wait(60) == 0
    left = checkpoint(store, damaged)
    assert left is not None
    assert step(left) >= done
    assert states(store, damaged) == ["queued", "running", "queued"]

    worker = processes.worker(GPU, HSCR_CHECKPOINT_EVERY="10")
    send_due(store, app)
    wait_until(lambda: resumed_at(store, damaged) == step(left), seconds=120, what="the resumption")
    kill_child(worker.pid)
    wait_until(lambda: store.jobs.get(damaged.id).state is JobState.QUEUED, what="the attempt's end")
    found = checkpoint(store, damaged)
    assert found is not None
    weights = next(found.rglob("adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    send_due(store, app)
    succeeded(store, damaged, seconds=180)
    assert told(store, damaged)[-1] == f"Training starts anew: {found.name} is damaged on disk."

    withdrawn = begun(store, app, LONG)
    wait_until(lambda: checkpoint(store, withdrawn), what="a checkpoint")
    kill_child(worker.pid)
    wait_until(lambda: store.jobs.get(withdrawn.id).state is JobState.QUEUED, what="the attempt's end")
    store.preferences.delete_study("study-1", "somebody")
    send_due(store, app)
    ended = succeeded(store, withdrawn, seconds=180)
    assert told(store, withdrawn) == [
        "A record was deleted since training began: it starts anew, without its checkpoint."
    ]
    assert resumed_at(store, withdrawn) is None
    trained = store.releases.trained_on((ended.result or {})["adapter"])
    assert trained == [f"pref_src_{index:04}" for index in (*range(4), *range(8, 16))]
    wait_until(lambda: not list((store.blobs.root / "checkpoints").iterdir()), what="their removal")


def begun(store: Store, app: Celery, payload: FinetunePayload) -> Job:
    """A job whose first steps are done."""
    job = submit(store, payload)
    send_due(store, app)
    wait_until(lambda: progress(store, job) > 0, seconds=120, what="the first step")
    return job


def test_a_zombie_neither_takes_over_nor_spoils(store: Store) -> None:
    terms = Terms(timedelta(seconds=30), heartbeat_seconds=1, timeout_seconds=60)
    job = store.jobs.submit(Job(kind=JobKind.FINETUNE))

    def attempt() -> Lease:
        store.jobs.resend(unclaimed_for=timedelta(hours=1), silent_for=timedelta())  # whoever has it is dead
        claimed = store.jobs.claim(job.id, "worker", timedelta(seconds=30))
        assert claimed is not None
        return Lease(store, claimed, terms)

    first = attempt()
    zombie = Kept.take_over(store, first)
    zombie.begin(["a", "b"])
    (zombie.steps / "checkpoint-5").mkdir(parents=True)

    kept = Kept.take_over(store, attempt())
    assert kept.records() == ["a", "b"]
    assert [path.name for path in kept.steps.iterdir()] == ["checkpoint-5"]
    with pytest.raises(LeaseLost):
        Kept.take_over(store, first)
    (zombie.steps / "checkpoint-9").mkdir(parents=True)

    last = attempt()
    assert [path.name for path in Kept.take_over(store, last).steps.iterdir()] == ["checkpoint-5"]
    kept_for = store.blobs.root / "checkpoints"
    assert [path.name for path in (kept_for / job.id).iterdir()] == ["3"]
    (kept_for / "job_of_a_lost_database").mkdir()
    drop_ended(store)
    assert [path.name for path in kept_for.iterdir()] == [job.id]
    store.jobs.fail(job.id, last.job.attempt, HscrError("over"))
    drop_ended(store)
    assert list(kept_for.iterdir()) == []
