"""Whatever dies at whichever step of a release: it ends wholly old or wholly new, and repairs itself.

Three versions take turns, so that the next one is never loaded yet. A step is held by the proxy between agent
and engine, by a stopped process, or inside the database.
"""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hscr.records import Job, JobState, Pointer
from hscr.store.store import Store
from tests.redis_server import RedisServer
from tests.waiting import wait_until
from tests.workers.engines import Engine, loaded, register, release, replica, start_agent
from tests.workers.harness import FAST, Processes, finished, migrated, state, succeeded
from tests.workers.proxy import CHAT, LOAD, UNLOAD, Proxy
from workers.settings import EMBEDDED_MODEL, WorkerSettings


class Stand:
    """One replica, all processes of a release, and three versions with what they answer."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.engine = engine
        (folder / "redis").mkdir()
        self.redis = RedisServer(folder / "redis").start()
        home = folder / "home"
        self.settings = migrated(
            WorkerSettings(home=home, redis_url=self.redis.url(), model_path=EMBEDDED_MODEL, **FAST)
        )
        self.store = Store.open(self.settings)
        self.proxy = Proxy(engine.url)
        self.processes = Processes(folder, self.settings)
        self.versions: list[str] = []
        self.texts: dict[str, str] = {}
        self.whole = True

    def start(self, folders: list[Path], probes: list[Any]) -> None:
        """The second version serves and the first is the previous one."""
        for folder, probe in zip(folders, probes, strict=True):
            self.versions.append(register(self.store, EMBEDDED_MODEL, folder, probe).name)
        for name, folder in zip(self.versions, folders, strict=True):  # an agent would unload what it asks
            self.engine.load("asked", folder)
            self.texts[name] = self.engine.answer("asked")
            self.engine.unload("asked")
        assert len(set(self.texts.values())) == 3, "an answer tells its version"
        self.start_agent()
        self.start_worker()
        self.processes.relay()
        self.processes.beat()
        for name in self.versions[:2]:
            succeeded(self.store, self.release(name), seconds=90)

    def start_agent(self) -> None:
        self.agent = start_agent(self.processes, self.engine, url=self.proxy.url)

    def start_worker(self) -> None:
        self.worker = self.processes.worker("control", concurrency=2)

    def stop(self) -> None:
        self.processes.stop()
        self.store.close()
        self.redis.kill()

    @property
    def pointer(self) -> Pointer:
        return self.store.releases.pointer()

    def next(self) -> str:
        """The version that is loaded nowhere."""
        return next(v for v in self.versions if v not in (self.pointer.active, self.pointer.previous))

    def release(self, version: str) -> Job:
        return release(self.store, version)

    def settled(self, active: str) -> None:
        """Pointer, replica, engine and answers agree on `active` and the version before it."""

        def whole() -> bool:
            kept = {self.pointer.active, self.pointer.previous}
            seen = replica(self.store)
            return (
                self.pointer.candidate is None
                and seen is not None
                and seen.ready
                and set(seen.loaded) == kept == self.engine.adapters()
            )

        wait_until(whole, seconds=90, what="the agreement of all")
        assert self.pointer.active == active
        for name in (self.pointer.active, self.pointer.previous):
            assert name is not None
            assert self.engine.answer(name) == self.texts[name]

    def told(self, line: str) -> int:
        """How often the processes have logged it."""
        return self.processes.logs().count(line)

    def outage(self) -> None:
        wait_until(lambda: (seen := replica(self.store)) and not seen.ready, what="the outage being reported")
        assert loaded(self.store) == ()


@pytest.fixture(scope="module")
def made(
    running: Engine, folders: list[Path], probes: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stand]:
    stand = Stand(tmp_path_factory.mktemp("faults"), running)
    with stand.proxy:
        try:
            stand.start(folders, probes)
            yield stand
        finally:
            stand.stop()


@pytest.fixture
def stand(made: Stand) -> Iterator[Stand]:
    assert made.whole, "an earlier test left the stand broken"
    made.whole = False
    assert made.pointer.active is not None
    made.settled(made.pointer.active)
    made.whole = True
    yield made
    sys.stderr.write(made.processes.logs())  # pytest shows it when the test failed


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@contextmanager
def trigger(stand: Stand, table: str, when: str, action: str) -> Iterator[None]:
    """What the database does before a row of `table` changes so that `when` holds."""
    forever = "WITH RECURSIVE c(n) AS (VALUES(1) UNION ALL SELECT n + 1 FROM c) SELECT count(*) AS n FROM c"
    database = stand.store.database
    with database.write() as connection:
        connection.exec_driver_sql(f"CREATE VIEW IF NOT EXISTS forever AS {forever}")
        connection.exec_driver_sql(
            f"CREATE TRIGGER fault BEFORE UPDATE ON {table} WHEN {when} BEGIN {action}; END"
        )
    try:
        yield
    finally:
        with database.write() as connection:
            connection.exec_driver_sql("DROP TRIGGER fault")


FLIP = {"table": "pointer", "when": "NEW.active IS NOT OLD.active"}
END = {"table": "jobs", "when": "NEW.state = 'succeeded'"}
NEVER_ENDS = {"action": "SELECT n FROM forever"}
READ_ONLY = {"action": "SELECT RAISE(ABORT, 'attempt to write a readonly database')"}


@pytest.mark.parametrize("path", [LOAD, CHAT], ids=["before the load", "before the probe"])
def test_the_engine_dies_before_it_is_told(stand: Stand, path: str) -> None:
    old, new = stand.pointer.active, stand.next()
    with stand.proxy.hold(path, new) as call:
        job = stand.release(new)
        call.wait()
        stand.engine.kill()
    stand.outage()
    assert stand.pointer.active == old
    stand.engine.start()
    succeeded(stand.store, job, seconds=90)
    stand.settled(new)


def test_the_engine_dies_in_the_load(stand: Stand) -> None:
    old, new = stand.pointer.active, stand.next()
    with stand.proxy.hold(LOAD, new) as load:
        job = stand.release(new)
        load.wait()
        with stand.engine.frozen():
            load.let_go()
            assert load.sent.wait(30)
            stand.engine.kill()
    stand.outage()
    assert stand.pointer.active == old
    stand.engine.start()
    succeeded(stand.store, job, seconds=90)
    stand.settled(new)


@contextmanager
def reported(stand: Stand, new: str) -> Iterator[Job]:
    """The replica has reported the version, and the worker stands still before it can know."""
    with stand.proxy.hold(LOAD, new) as load:
        job = stand.release(new)
        load.wait()
        with stand.store.database.write():  # so that it is not stopped within a transaction of its own
            stand.worker.send_signal(signal.SIGSTOP)
            wait_until(lambda: state(stand.worker.pid) == "T", what="the worker standing still")
    try:
        wait_until(lambda: new in loaded(stand.store), what="the report")
        yield job
    finally:
        stand.worker.send_signal(signal.SIGCONT)


def test_the_engine_dies_between_its_report_and_the_flip(stand: Stand) -> None:
    """The flip looks again, in its own transaction."""
    old, new = stand.pointer.active, stand.next()
    with reported(stand, new) as job:
        stand.engine.kill()
        stand.outage()
    assert stand.pointer.active == old
    stand.engine.start()
    succeeded(stand.store, job, seconds=90)
    stand.settled(new)


def test_the_engine_dies_after_the_flip_at_the_unload(stand: Stand) -> None:
    new, leaving = stand.next(), stand.pointer.previous
    assert leaving is not None
    with stand.proxy.hold(UNLOAD, leaving) as unload:
        succeeded(stand.store, stand.release(new), seconds=90)
        unload.wait()
        assert leaving not in loaded(stand.store), "nobody is sent there any more"
        stand.engine.kill()
    stand.outage()
    stand.engine.start()
    stand.settled(new)


def test_the_worker_dies_waiting_for_the_replicas(stand: Stand) -> None:
    old, new = stand.pointer.active, stand.next()
    with stand.proxy.hold(LOAD, new) as load:
        job = stand.release(new)
        load.wait()
        kill(stand.worker)
        assert (stand.pointer.active, stand.pointer.candidate) == (old, new)
    stand.start_worker()
    assert succeeded(stand.store, job, seconds=90).attempt == 2
    stand.settled(new)


def test_the_worker_dies_before_the_flip_is_committed(stand: Stand) -> None:
    old, new = stand.pointer.active, stand.next()
    line = f"{new} is loaded on every live replica"
    before = stand.told(line)
    with trigger(stand, **FLIP, **NEVER_ENDS):
        job = stand.release(new)
        wait_until(lambda: stand.told(line) > before, seconds=60, what="the flip")
        kill(stand.worker)
        assert (stand.pointer.active, stand.pointer.candidate) == (old, new)
    stand.start_worker()
    assert succeeded(stand.store, job, seconds=90).attempt == 2
    stand.settled(new)


def test_the_worker_dies_after_the_flip_is_committed(stand: Stand) -> None:
    """Its next attempt finds the work done, and does not do it twice."""
    new = stand.next()
    with trigger(stand, **END, **NEVER_ENDS):
        job = stand.release(new)
        wait_until(lambda: stand.pointer.active == new, seconds=60, what="the flip")
        kill(stand.worker)
        epoch = stand.pointer.epoch
        assert stand.store.jobs.get(job.id).state is JobState.RUNNING
    stand.start_worker()
    ended = succeeded(stand.store, job, seconds=90)
    assert (ended.result or {})["already_active"]
    assert stand.pointer.epoch == epoch
    stand.settled(new)


def test_the_worker_dies_for_the_last_time(stand: Stand) -> None:
    """Nobody is left to clean up but the sweeper."""
    old, new = stand.pointer.active, stand.next()
    assert old is not None
    with stand.proxy.hold(LOAD, new) as load:
        job = stand.release(new)
        load.wait()
        kill(stand.worker)
        with stand.store.database.write() as connection:
            twice = '{"state": "queued", "failures": 2}'
            change = f"UPDATE job_events SET data = '{twice}' WHERE job_id = '{job.id}' AND seq = 1"
            connection.exec_driver_sql(change)
    stand.start_worker()
    ended = finished(stand.store, job, seconds=90)
    assert "3 attempts; the last: the worker's lease expired" in (ended.error or {})["detail"]
    stand.settled(old)


@pytest.mark.parametrize(
    ("path", "answered"),
    [(LOAD, False), (LOAD, True), (CHAT, False)],
    ids=["before the load", "after the load", "in the probe"],
)
def test_the_agent_dies_before_its_report(stand: Stand, path: str, answered: bool) -> None:
    new = stand.next()
    with stand.proxy.hold(path, new, answered=answered) as call:
        job = stand.release(new)
        call.wait()
        kill(stand.agent)
        assert new not in loaded(stand.store)
    stand.start_agent()
    assert succeeded(stand.store, job, seconds=90).attempt == 1
    stand.settled(new)


def test_the_agent_dies_between_its_report_and_the_flip(stand: Stand) -> None:
    new = stand.next()
    with reported(stand, new) as job:
        kill(stand.agent)
        stand.start_agent()
    succeeded(stand.store, job, seconds=90)
    stand.settled(new)


def test_the_agent_dies_at_the_unload(stand: Stand) -> None:
    new, leaving = stand.next(), stand.pointer.previous
    assert leaving is not None
    with stand.proxy.hold(UNLOAD, leaving) as unload:
        succeeded(stand.store, stand.release(new), seconds=90)
        unload.wait()
        kill(stand.agent)
    stand.start_agent()
    stand.settled(new)


def test_redis_dies_in_the_middle(stand: Stand) -> None:
    """A release under way ends without it; one submitted meanwhile waits for it."""
    new = stand.next()
    with stand.proxy.hold(LOAD, new) as load:
        job = stand.release(new)
        load.wait()
        stand.redis.kill()
    succeeded(stand.store, job, seconds=60)
    stand.settled(new)
    later = stand.next()
    waiting = stand.release(later)
    stand.settled(new)
    assert stand.store.jobs.get(waiting.id).state is JobState.QUEUED
    stand.redis.start()
    succeeded(stand.store, waiting, seconds=90)
    stand.settled(later)


def test_the_database_is_locked_for_longer_than_anybody_waits(stand: Stand) -> None:
    old, new = stand.pointer.active, stand.next()
    line = "heartbeat failed (DatabaseUnavailable)"
    before = stand.told(line)
    with reported(stand, new) as job:
        lock = sqlite3.connect(stand.settings.home / "hscr.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
    wait_until(lambda: stand.told(line) > before, seconds=60, what="the worker's heartbeat giving up")
    assert stand.pointer.active == old
    lock.close()
    succeeded(stand.store, job, seconds=90)
    stand.settled(new)


def test_the_database_takes_no_flip(stand: Stand) -> None:
    """As when its disk became read-only: every attempt fails, and the old version goes on serving."""
    old, new = stand.pointer.active, stand.next()
    assert old is not None
    with trigger(stand, **FLIP, **READ_ONLY):
        ended = finished(stand.store, stand.release(new), seconds=90)
        assert "the database failed" in (ended.error or {})["detail"]
        stand.settled(old)
    succeeded(stand.store, stand.release(new), seconds=90)
    stand.settled(new)


def test_the_stored_files_cannot_be_read(stand: Stand) -> None:
    """A release waits for the store, and what serves needs it no more."""
    old, new = stand.pointer.active, stand.next()
    assert old is not None
    folders = stand.store.blobs.root / "folders"
    folders.rename(folders.with_name("away"))
    job = stand.release(new)
    wait_until(lambda: (seen := replica(stand.store)) and new in (seen.problem or ""), what="the problem")
    seen = replica(stand.store)
    assert seen is not None
    assert (seen.ready, set(seen.loaded)) == (True, {old, stand.pointer.previous})
    folders.with_name("away").rename(folders)
    succeeded(stand.store, job, seconds=90)
    stand.settled(new)
