"""SIGTERM ends every process of the workers soon, in good order, and with all that it started."""

import os
import signal
import subprocess
from datetime import timedelta

import pytest

from hscr.config import FinetuneConfig
from hscr.processes import MARK, marked
from hscr.records import JobState
from hscr.store.store import Store
from tests.waiting import wait_until
from tests.workers.harness import Processes, alive, gpu_child, make_records, progress, states, submit
from workers.app import FORCED
from workers.contract import FinetunePayload

GPU = "generate,score,finetune"
ENDLESS = FinetunePayload(
    config=FinetuneConfig(rank=4, epochs=10_000, batch_size=8), method="random", evaluate=None
)


def test_relay_beat_and_idle_workers_end_with_0(store: Store, processes: Processes) -> None:
    mark = {MARK: "idle-workers"}
    started = [processes.start("workers.outbox", **mark), processes.worker("control,evaluate", 4, **mark)]
    started += [processes.worker(GPU, **mark), processes.beat(**mark)]
    wait_until(lambda: processes.logs().count(" ready.") == 2, seconds=90, what="both workers")
    wait_until(lambda: "beat: Starting" in processes.logs(), seconds=90, what="beat")
    for process in started:
        process.send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in started] == [0, 0, 0, 0]
    assert marked("idle-workers") == []


@pytest.mark.parametrize("moment", ["making a class within a tick", "opening the schedule"])
def test_beat_ends_with_0_whenever_it_is_asked(moment: str, store: Store, processes: Processes) -> None:
    beat = processes.start("celery", "-A", "tests.workers.ended_at", "beat", ENDED_AT=moment)
    assert beat.wait(60) == 0, processes.logs()


def test_a_worker_that_cannot_hand_back_its_job_is_ended_by_force(store: Store, processes: Processes) -> None:
    """By the second SIGTERM or the grace's end; its child goes with it, though it is stopped."""
    make_records(store, 16)
    processes.relay()
    job = submit(store, ENDLESS)

    def stuck(grace: str) -> tuple[subprocess.Popen[bytes], int]:
        """A worker that waits for its child's checkpoint, and the child, which stands still."""
        before = progress(store, job)
        long = {"HSCR_CHECKPOINT_GRACE_SECONDS": "3600", "HSCR_STOP_GRACE_SECONDS": grace}
        worker = processes.worker(GPU, HSCR_CHECKPOINT_EVERY="10", **long)
        wait_until(lambda: progress(store, job) > before, seconds=120, what="progress")
        child = gpu_child(worker.pid)
        assert child is not None
        os.kill(child, signal.SIGSTOP)
        worker.send_signal(signal.SIGTERM)
        return worker, child

    worker, child = stuck("3600")
    wait_until(lambda: "Warm shutdown" in processes.logs(), what="the first signal being heard")
    assert worker.poll() is None
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == FORCED
    wait_until(lambda: not alive(child), what="the child's end")
    assert "ended by force: it was asked again" in processes.logs()
    terms = {"unclaimed_for": timedelta(hours=1), "silent_for": timedelta(seconds=5)}
    wait_until(lambda: store.jobs.resend(**terms), what="the lease's end")

    worker, child = stuck("0.5")
    assert worker.wait(60) == FORCED
    wait_until(lambda: not alive(child), what="the child's end")
    assert "ended by force: it had not stopped after 0.5 s" in processes.logs()
    assert store.jobs.get(job.id).state is JobState.RUNNING
    assert states(store, job) == ["queued", "running", "queued", "running"]
