"""Three engines with their agents: they move together, or not at all."""

import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hscr.records import Job, JobState, Replica
from hscr.store.store import Store
from tests.redis_server import RedisServer, free_port
from tests.waiting import wait_until
from tests.workers.engines import Engine, loaded_by_each, register, release, replicas, start_agent
from tests.workers.harness import FAST, Processes, finished, migrated, succeeded
from tests.workers.proxy import LOAD, Proxy
from workers.settings import EMBEDDED_MODEL, WorkerSettings

NAMES = ("one", "two", "three")


class Fleet:
    """Three replicas, each behind a proxy, and a worker that waits for none longer than ten seconds."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        settings = WorkerSettings(
            home=folder / "home", redis_url=redis_url, model_path=EMBEDDED_MODEL, **FAST
        )
        self.store = Store.open(migrated(settings))
        self.processes = Processes(folder, settings)
        self.engines = {name: Engine(EMBEDDED_MODEL, free_port()) for name in NAMES}
        self.proxies = {name: Proxy(engine.url) for name, engine in self.engines.items()}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Engine.start, self.engines.values()))
        for name in NAMES:
            self.start_agent(name)
        self.processes.relay()
        self.processes.worker("control", HSCR_ROLLOUT_SECONDS="10")
        wait_until(lambda: len(self.replicas()) == 3, seconds=60, what="the three replicas")

    def start_agent(self, name: str) -> None:
        self.agents[name] = start_agent(
            self.processes, self.engines[name], url=self.proxies[name].url, name=name
        )

    def stop(self) -> None:
        self.processes.stop()
        for engine in self.engines.values():
            engine.kill()
        self.store.close()

    def replicas(self) -> dict[str, Replica]:
        return replicas(self.store)

    def loaded(self) -> dict[str, set[str]]:
        return loaded_by_each(self.store)

    def release(self, version: str) -> Job:
        return release(self.store, version)

    def agreed(self, *versions: str) -> None:
        """Every replica reports these versions and no other, and its engine holds no other."""
        expected = {name: set(versions) for name in NAMES}
        wait_until(lambda: self.loaded() == expected, seconds=60, what=f"{versions} on all replicas")
        wait_until(
            lambda: all(engine.adapters() == set(versions) for engine in self.engines.values()),
            what="the same in every engine",
        )
        assert all(replica.ready and replica.problem is None for replica in self.replicas().values())

    def answers(self, version: str) -> list[str]:
        return [engine.answer(version) for engine in self.engines.values()]


@pytest.fixture
def fleet(redis_server: RedisServer, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, redis_server.url(99))
    with ExitStack() as stack:
        for proxy in fleet.proxies.values():
            stack.enter_context(proxy)
        stack.callback(fleet.stop)
        fleet.start()
        yield fleet


def test_three_replicas(fleet: Fleet, folders: list[Path], probes: list[Any]) -> None:
    """A release, one that a replica fails, a replica that joins, adapters of unknown origin."""
    store = fleet.store
    first, second, third = (
        register(store, EMBEDDED_MODEL, *each).name for each in zip(folders, probes, strict=True)
    )

    # All load; the pointer flips only after the last one's report.
    with fleet.proxies["three"].hold(LOAD, first) as load:
        job = fleet.release(first)
        load.wait()
        others = {"one": {first}, "two": {first}, "three": set()}
        wait_until(lambda: fleet.loaded() == others, what="the report of the others")
        assert store.releases.pointer().active is None
    succeeded(store, job)
    fleet.agreed(first)
    assert len(set(fleet.answers(first))) == 1

    # One replica is away: the old version serves on, everywhere, and the error says who and why.
    fleet.engines["three"].kill()
    failed = finished(store, fleet.release(second), seconds=60)
    assert failed.state is JobState.FAILED
    detail = (failed.error or {})["detail"]
    assert f"three has not loaded {second}" in detail
    assert "did not answer" in detail
    assert "one has not loaded" not in detail
    pointer = store.releases.pointer()
    assert (pointer.active, pointer.candidate) == (first, None)
    assert fleet.engines["one"].answer(first) == fleet.engines["two"].answer(first)

    # It comes back with somebody's adapters, and is brought to what is desired before it is ready.
    seen: list[Replica] = []
    with fleet.proxies["three"].hold(LOAD, first) as load:
        fleet.engines["three"].start()
        fleet.engines["three"].load("somebody's", folders[2])
        load.wait()
        seen.append(fleet.replicas()["three"])
    assert [(replica.ready, replica.loaded) for replica in seen] == [(False, ())]
    fleet.agreed(first)

    # A replica goes and joins again after a release without it: it has the new version before it is ready.
    fleet.agents["three"].send_signal(signal.SIGTERM)
    assert fleet.agents["three"].wait(15) == 0
    succeeded(store, fleet.release(second))
    assert fleet.loaded() == {"one": {first, second}, "two": {first, second}}
    with fleet.proxies["three"].hold(LOAD, second) as load:
        fleet.start_agent("three")
        load.wait()
        assert "three" not in fleet.replicas() or not fleet.replicas()["three"].ready
    fleet.agreed(first, second)

    # So does one whose agent died, and which nobody heard of meanwhile.
    fleet.agents["two"].kill()
    fleet.agents["two"].wait()
    wait_until(lambda: "two" not in fleet.replicas(), what="the silence being noticed")
    succeeded(store, fleet.release(third))
    fleet.start_agent("two")
    fleet.agreed(second, third)
    assert len(set(fleet.answers(third))) == 1
    assert fleet.answers(third) != fleet.answers(second)
