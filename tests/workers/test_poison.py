"""A job that nobody survives is parked with its reason, and never in the way of others."""

from hscr.records import Job, JobKind, JobState
from hscr.store.store import Store
from tests.workers.harness import RANDOM, Processes, add_sources, finished, states, submit, succeeded
from workers.contract import GeneratePayload


def test_poison_is_parked_and_the_queue_goes_on(store: Store, processes: Processes) -> None:
    """One job cannot be read by this version; another one's image ends its child in an unforeseen way."""
    good, bad = add_sources(store, 2)
    store.preferences.add_sources(
        [bad.but(id="src_bad", image_digest=store.blobs.put(b"no image"), study="study-bad")]
    )
    unread = store.jobs.submit(Job(kind=JobKind.GENERATE, payload={"config": {"sed": 1}, "version": 99}))
    poison = submit(store, GeneratePayload(config=RANDOM, source_ids=("src_bad",)))
    healthy = submit(store, GeneratePayload(config=RANDOM, source_ids=(good.id, bad.id)))
    processes.relay()
    processes.worker("generate")

    served = succeeded(store, healthy, seconds=180)
    parked = finished(store, poison, seconds=180)

    assert parked.state is JobState.FAILED
    reason = "The job did not survive 3 attempts; the last: the GPU child met an unexpected"
    assert (parked.error or {})["detail"] == f"{reason} UnidentifiedImageError."
    assert "hscr jobs retry" in (parked.error or {})["remedy"]
    assert states(store, poison) == ["queued", "running"] * 3 + ["failed"]
    assert served.finished_at is not None
    assert parked.finished_at is not None
    assert served.finished_at < parked.finished_at, "it waited for one attempt, not for three"

    refused = store.jobs.get(unread.id)
    assert (refused.state, refused.attempt) == (JobState.FAILED, 1)
    assert "cannot read the job's payload: config.sed" in (refused.error or {})["detail"]

    again = store.jobs.retry(poison.id)
    assert store.jobs.retry(poison.id) == again
    assert finished(store, again, seconds=180).state is JobState.FAILED
    assert again.payload == poison.payload
