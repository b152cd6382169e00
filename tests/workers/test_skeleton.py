"""Submit, relay, claim, finish: real processes, a real queue."""

import signal

from hscr.store.store import Store
from tests.workers.harness import Processes, states, submit, succeeded
from workers.contract import ReleasePayload


def test_a_job_goes_through_relay_queue_and_worker(store: Store, processes: Processes) -> None:
    job = submit(store, ReleasePayload(version_name=None, actor="key_1", reason="back to base"))
    relay, worker = processes.relay(), processes.worker("control,evaluate", concurrency=2)

    ended = succeeded(store, job)

    assert states(store, job) == ["queued", "running", "succeeded"]
    assert ended.attempt == 1
    assert ended.result == {"already_active": True, "active": None, "previous": None, "epoch": 0}
    for process in (relay, worker):
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
