"""The relay and a queue that comes and goes."""

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hscr.records import Job, JobKind
from hscr.store.store import Store
from tests.redis_server import RedisServer
from tests.waiting import wait_until
from tests.workers.harness import Processes
from workers.broker import build
from workers.outbox import relay, send_due
from workers.settings import WorkerSettings


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder).start()
    yield server
    server.kill()


def sent(server: RedisServer, queue: str, database: int = 0) -> list[str]:
    """Job ids of the waiting messages, oldest first."""
    waiting = server.client(database).lrange(queue, 0, -1)
    bodies = [json.loads(message)["headers"]["argsrepr"] for message in reversed(waiting)]
    return [body.split("'")[1] for body in bodies]


def test_due_jobs_are_sent_in_order_with_nothing_but_their_id(
    store: Store, settings: WorkerSettings, own_redis: RedisServer
) -> None:
    app = build(settings.model_copy(update={"redis_url": own_redis.url()}))
    jobs = [store.jobs.submit(Job(kind=JobKind.SCORE, payload={"candidate": "x"})) for _ in range(3)]
    release = store.jobs.submit(Job(kind=JobKind.RELEASE))

    assert send_due(store, app) == 4
    assert send_due(store, app) == 0

    assert sent(own_redis, "score") == [job.id for job in jobs]
    assert sent(own_redis, "control") == [release.id]
    assert b"candidate" not in b"".join(own_redis.client().lrange("score", 0, -1))


def test_the_relay_waits_for_a_dead_queue_and_goes_on(
    store: Store, settings: WorkerSettings, own_redis: RedisServer
) -> None:
    app = build(settings.model_copy(update={"redis_url": own_redis.url()}))
    stop = threading.Event()
    thread = threading.Thread(target=relay, args=(store, app, stop), kwargs={"every_seconds": 0.05})
    own_redis.kill()
    job = store.jobs.submit(Job(kind=JobKind.SCORE))
    thread.start()
    try:
        assert len(store.jobs.due()) == 1
        own_redis.start()
        wait_until(lambda: not store.jobs.due(), seconds=20, what="the message being sent")
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()
    assert sent(own_redis, "score") == [job.id]


def test_the_process_ends_cleanly(store: Store, processes: Processes) -> None:
    process = processes.relay()
    store.jobs.submit(Job(kind=JobKind.SCORE))
    wait_until(lambda: not store.jobs.due(), what="the message being sent")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_a_stale_database_refuses_with_the_command_to_run(processes: Processes, tmp_path: Path) -> None:
    process = processes.start("workers.outbox", HSCR_HOME=str(tmp_path / "empty"))
    assert process.wait(30) != 0
    assert "hscr db upgrade" in processes.logs()
