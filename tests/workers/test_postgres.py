"""PostgreSQL goes away under a worker with a lease, relay and agent: none of them is started again."""

import re

import pytest

from hscr.records import JobState
from hscr.store.store import Store
from tests.postgres_server import PASSWORD, PostgresServer
from tests.waiting import wait_until
from tests.workers.engines import Engine, replica, start_agent
from tests.workers.harness import RANDOM, Processes, add_sources, states, submit, succeeded
from tests.workers.test_crashes import GPU, progress
from workers.contract import GeneratePayload
from workers.settings import WorkerSettings


@pytest.fixture
def settings(settings: WorkerSettings, postgres: PostgresServer) -> WorkerSettings:
    return settings.model_copy(update={"database_url": postgres.migrated()})


def test_everybody_goes_on_after_the_database_was_away(
    store: Store, processes: Processes, engine: Engine, postgres: PostgresServer
) -> None:
    sources = add_sources(store, 400)
    running = [
        start_agent(processes, engine),
        processes.relay(),
        processes.worker("control"),
        processes.worker(GPU),
        processes.beat(),
    ]
    job = submit(store, GeneratePayload(config=RANDOM))
    wait_until(lambda: replica(store), seconds=90, what="the agent's report")
    wait_until(lambda: progress(store, job) > 0, seconds=90, what="the first records")
    assert store.jobs.get(job.id).state is JobState.RUNNING

    postgres.kill()
    noticed = (
        "the store is away: DatabaseUnavailable",
        "cannot send: DatabaseUnavailable",
        rf"{job.id}.*(heartbeat failed|the database failed) \(DatabaseUnavailable\)",
    )
    for told in noticed:
        wait_until(lambda told=told: re.search(told, processes.logs()), seconds=60, what=told)
    postgres.start()

    ended = succeeded(store, job, seconds=120)
    made = [record.source for record in store.preferences.page(limit=1000)]
    skipped = store.preferences.skipped(job.id)
    assert len(made) == len(set(made)), "no source twice"
    assert set(made) | skipped.keys() == {source.id for source in sources}, "and none left out"
    assert ended.result is not None
    assert ended.result["records"] == len(made)
    assert states(store, job)[-1] == "succeeded"
    assert states(store, job).count("succeeded") == 1
    seen = replica(store)
    assert seen is not None
    wait_until(lambda: replica(store) not in (None, seen), what="the agent reporting again")
    later = submit(store, GeneratePayload(config=RANDOM))
    succeeded(store, later)
    assert [process.poll() for process in running] == [None] * len(running), "nobody was started again"
    assert PASSWORD not in processes.logs()
