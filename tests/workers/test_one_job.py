"""A worker that ends after one job: what each pod of a KEDA ScaledJob runs."""

from hscr.records import JobState
from hscr.store.store import Store
from tests.workers.harness import Processes, submit, succeeded
from workers.contract import ReleasePayload


def test_it_ends_after_its_first_job_and_leaves_the_others(store: Store, processes: Processes) -> None:
    first, second = (
        submit(store, ReleasePayload(version_name=None, actor="key_1", reason="back to base"))
        for _ in range(2)
    )
    processes.relay()

    one = processes.worker("control", HSCR_ONE_JOB_SECONDS="60")
    assert one.wait(60) == 0
    ended = [store.jobs.get(job.id).state for job in (first, second)]
    assert sorted(ended) == [JobState.QUEUED, JobState.SUCCEEDED]

    # Whatever became of the second message: the job is still there for the next worker.
    processes.worker("control")
    processes.beat()
    succeeded(store, first)
    succeeded(store, second, seconds=120)


def test_it_ends_when_no_job_comes(store: Store, processes: Processes) -> None:
    assert processes.worker("control", HSCR_ONE_JOB_SECONDS="0.5").wait(60) == 0
