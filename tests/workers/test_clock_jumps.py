"""Real processes on a host whose clock jumps: nobody's job is taken, and who dies is found dead."""

import os
import signal
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from hscr.config import FinetuneConfig
from hscr.records import Job, JobState, now
from hscr.store.store import Store
from tests.waiting import wait_until
from tests.workers.clocks import WallClock
from tests.workers.harness import Processes, gpu_child, make_records, progress, states, submit, succeeded
from workers.contract import FinetunePayload

HOUR = timedelta(hours=1)
LONG = FinetunePayload(config=FinetuneConfig(rank=4, epochs=80, batch_size=8), method="random", evaluate=None)
QUEUES = "control,evaluate,generate,score,finetune"


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path)


def newest(store: Store, job: Job) -> datetime:
    """The last stamp of the job's story."""
    return store.jobs.events(job.id)[-1].created_at


def test_a_fine_tune_outlives_its_hosts_clock_and_its_worker(
    store: Store, processes: Processes, clock: WallClock
) -> None:
    make_records(store, 16)
    first = processes.worker(QUEUES, concurrency=2, **clock.environment)
    processes.relay(**clock.environment)
    processes.beat(**clock.environment)
    job = submit(store, LONG)

    def steps_by_the_moved_clock(before: int) -> bool:
        told = newest(store, job) - now()
        return progress(store, job) > before and abs(told - clock.ahead) < HOUR / 2

    for by in (HOUR, -HOUR, -HOUR, 2 * HOUR):
        before = progress(store, job)
        clock.jump(by)
        wait_until(lambda before=before: steps_by_the_moved_clock(before), seconds=120, what="further steps")
    assert states(store, job) == ["queued", "running"]

    child = gpu_child(first.pid)
    assert child is not None
    os.kill(child, signal.SIGKILL)
    first.kill()
    clock.jump(-HOUR)
    assert store.jobs.get(job.id).state is JobState.RUNNING
    processes.worker(QUEUES, concurrency=2, **clock.environment)
    succeeded(store, job, seconds=180)
    assert states(store, job) == ["queued", "running", "queued", "running", "succeeded"]
