"""Two copies of the gateway, as processes of their own on one store: they agree on what serves, at once."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic

import httpx2
import pytest

from hscr.records import now
from hscr.store.releases import add_adapter
from hscr.store.tables import gateways
from service.settings import GatewaySettings
from tests.service.conftest import (
    FOREVER,
    IMAGE,
    QUESTION,
    VERSIONS,
    adapter,
    b64,
    idle,
    replica,
    standing_still,
)
from tests.service.scripted import ScriptedEngine, scripted
from tests.service.test_process import free_port
from tests.waiting import wait_until

A, B = VERSIONS
BODY = {"image": b64(IMAGE), "question": QUESTION}


@dataclass(frozen=True)
class Copy:
    url: str
    process: subprocess.Popen

    def post(self, path: str, body: dict) -> httpx2.Response:
        return httpx2.post(f"{self.url}{path}", json=body, timeout=30)


@contextmanager
def copy(settings) -> Iterator[Copy]:
    """`python -m service` with its default settings, but for the age of a replica's row."""
    port = free_port()
    environment = {"HSCR_HOME": str(settings.home), "HSCR_REPLICAS_SEEN": str(FOREVER), "PATH": "/usr/bin"}
    command = [sys.executable, "-m", "service", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None
        with suppress(httpx2.TransportError):
            return httpx2.get(f"{url}/readyz", timeout=5).status_code == 200
        return False

    try:
        wait_until(ready, what="a copy's start")
        yield Copy(url, process)
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture
def engine(store) -> Iterator[ScriptedEngine]:
    with store.database.write() as connection:
        for name in VERSIONS:
            add_adapter(connection, adapter(name), [])
    with scripted() as engine:
        store.releases.report_replica(replica(engine.address))
        yield engine


@pytest.fixture
def copies(settings, engine) -> Iterator[tuple[Copy, Copy]]:
    with ExitStack() as stack:
        yield stack.enter_context(copy(settings)), stack.enter_context(copy(settings))


@dataclass
class Traffic:
    """One client that asks one copy again and again; for each request, when it began and who answered."""

    url: str
    stop: threading.Event = field(default_factory=threading.Event)
    answers: list[tuple[float, int, str | None]] = field(default_factory=list)

    def run(self) -> None:
        with httpx2.Client(base_url=self.url, timeout=30) as client:
            while not self.stop.is_set():
                began = monotonic()
                reply = client.post("/v1/vqa", json=BODY)
                adapter = reply.json()["provenance"]["adapter"] if reply.status_code == 200 else None
                self.answers.append((began, reply.status_code, adapter))


@contextmanager
def traffic(copies: tuple[Copy, ...]) -> Iterator[list[Traffic]]:
    """Two clients per copy. All is quiet again at the end of the block."""
    clients = [Traffic(each.url) for each in copies for _ in range(2)]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield clients
    finally:
        for client in clients:
            client.stop.set()
        for thread in threads:
            thread.join()


def epochs(store) -> list[int]:
    with store.database.read() as connection:
        return [row.epoch for row in connection.execute(gateways.select())]


def oldest_heartbeat(store) -> timedelta:
    with store.database.read() as connection:
        return max(now() - row.seen_at for row in connection.execute(gateways.select()))


def rename(store, table: str, name: str) -> None:
    with store.database.write() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO {name}")


def agreed(store) -> bool:
    """Whether both copies' heartbeats name the present epoch."""
    return epochs(store) == [store.releases.pointer().epoch] * 2


def promote(store, version: str) -> None:
    store.releases.promote(
        version, actor="test", reason="test", override=True, replicas_seen=timedelta(days=1)
    )


def test_after_a_rollback_no_copy_sends_anything_new_to_the_old_version(copies, store, engine):
    promote(store, A)
    promote(store, B)
    wait_until(lambda: agreed(store), what="both copies at B")
    with traffic(copies) as clients:
        wait_until(lambda: all(len(client.answers) > 3 for client in clients), what="traffic")
        called = monotonic()
        done = copies[0].post("/v1/adapters/rollback", {"reason": "worse"})
        assert done.json()["active"] == A
        wait_until(lambda: agreed(store), what="both copies at A")
        seen = monotonic()
        wait_until(lambda: idle(store, B), what="the drain of B")
        to_the_old = sum(exchange.model == B for exchange in engine.exchanges)
        wait_until(lambda: all(client.answers[-1][0] > seen for client in clients), what="later requests")
    everything = [answer for client in clients for answer in client.answers]
    assert {status for _, status, _ in everything} == {200}
    assert {version for began, _, version in everything if began > seen} == {A}
    assert sum(exchange.model == B for exchange in engine.exchanges) == to_the_old
    old = [exchange.asked_at for exchange in engine.exchanges if exchange.model == B]
    last, both = 1000 * (max(old) - called), 1000 * (seen - called)
    told = f"the last request to the old version came {last:.0f} ms after the call; both copies agreed after"
    print(f"{told} {both:.0f} ms ({len(everything)} requests)")  # noqa: T201


def test_a_copy_that_slept_over_a_rollback_and_cannot_see_the_pointer_answers_nothing(copies, store, engine):
    promote(store, A)
    promote(store, B)
    wait_until(lambda: agreed(store), what="both copies at B")
    awake, frozen = copies
    with standing_still(frozen.process):
        assert awake.post("/v1/adapters/rollback", {"reason": "worse"}).json()["active"] == A
        stale = timedelta(seconds=GatewaySettings().pointer_stale)
        wait_until(lambda: oldest_heartbeat(store) > stale, what="the frozen copy's age")
        assert not idle(store, B)
        rename(store, "pointer", "elsewhere")
    refused = frozen.post("/v1/vqa", BODY)
    assert (refused.status_code, refused.json()["type"]) == (503, "/problems/pointer-stale")
    assert engine.exchanges == []
    rename(store, "elsewhere", "pointer")
    wait_until(lambda: frozen.post("/v1/vqa", BODY).status_code == 200, what="the copy's recovery")
    assert {exchange.model for exchange in engine.exchanges} == {A}
    wait_until(lambda: idle(store, B), what="the drain of B")


def test_what_an_agent_reports_is_every_copys_view(copies, store, engine):
    promote(store, A)
    wait_until(lambda: agreed(store), what="both copies at A")
    with scripted() as second:
        began = monotonic()
        store.releases.report_replica(replica(engine.address, loaded=()))
        store.releases.report_replica(replica(second.address, "engine-1", loaded=(A,)))

        def served_by(copy: Copy) -> set[str]:
            models = httpx2.get(f"{copy.url}/v1/models", timeout=30).json()["data"]
            return {f"{model['id']}:{model['replicas']}" for model in models}

        wait_until(lambda: all(served_by(each) == {f"{A}:1", "tiny:2"} for each in copies), what="one view")
        print(f"both copies route by two agents' reports after {1000 * (monotonic() - began):.0f} ms")  # noqa: T201
        assert {each.post("/v1/vqa", BODY).status_code for each in copies} == {200}
        assert [exchange.model for exchange in second.exchanges] == [A, A]
        assert engine.exchanges == []
