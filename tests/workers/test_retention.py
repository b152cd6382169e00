"""Fine-tunes around a deletion, as real jobs: what was deleted before or meanwhile is in no new version."""

from hscr.config import FinetuneConfig
from hscr.store.store import Store
from tests.waiting import wait_until
from tests.workers.harness import Processes, make_records, states, submit, succeeded
from workers.contract import FinetunePayload

CONFIG = FinetuneConfig(rank=4, epochs=12, batch_size=8)


def test_training_again_contains_nothing_of_a_deleted_study(store: Store, processes: Processes) -> None:
    records = make_records(store, 16)
    of_study = {
        study: {record.id for record in records if record.study == study}
        for study in {record.study for record in records}
    }
    payload = FinetunePayload(config=CONFIG, method="random", evaluate=None)
    processes.relay()
    processes.worker("generate,score,finetune")

    first = (succeeded(store, submit(store, payload), seconds=120).result or {})["adapter"]
    assert set(store.releases.trained_on(first)) == {record.id for record in records}
    adapters, _ = store.preferences.delete_study("study-0", "key_1")
    assert adapters == [first]

    job = submit(store, payload)
    wait_until(
        lambda: any(e.type == "progress" for e in store.jobs.events(job.id)), seconds=90, what="a step"
    )
    adapters, _ = store.preferences.delete_study("study-1", "key_1")
    assert adapters == [first], "the one in training is no version yet"
    second = (succeeded(store, job, seconds=120).result or {})["adapter"]

    assert states(store, job) == ["queued", "running", "queued", "running", "succeeded"]
    assert set(store.releases.trained_on(second)) == of_study["study-2"] | of_study["study-3"]
    one, other = store.releases.adapter(first), store.releases.adapter(second)
    assert (one.records, other.records) == (16, 8)
    assert one.records_digest != other.records_digest
    assert one.digest != other.digest
    assert store.preferences.tombstone("study-1").adapters == (first,)
