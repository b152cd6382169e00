"""Every process on a host of its own, and a network between them that loses what it is told to lose."""

import sys
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from hscr.gateway_http import Http
from hscr.records import Role
from hscr.serving import Serving
from hscr.store.store import Store
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer
from tests.serving import EngineProcess, ready
from tests.waiting import wait_until
from tests.workers.engines import loaded_by_each, register, release, replicas, start_agent
from tests.workers.harness import FAST, Processes, migrated, png, succeeded
from tests.workers.hosts import Host, Network, require_hosts
from workers.settings import EMBEDDED_MODEL, WorkerSettings

GATEWAY_PORT, ENGINE_PORT = 8080, 8100
PATIENCE = 20.0
"""Seconds that a client waits for a gateway: less than a gateway lets an engine be silent."""


class Hosts:
    """Two gateways, two engines with their agents, a worker with the relay, and Redis: seven hosts.

    PostgreSQL is the eighth, and the host of the tests.
    """

    def __init__(self, folder: Path, network: Network, stack: ExitStack) -> None:
        self.network = network
        self.postgres = PostgresServer(address=network.here)
        stack.callback(self.postgres.remove)
        self.postgres.start()
        queue, self._worker = network.host(), network.host()
        redis = RedisServer(folder, address=queue.address, within=queue.within).start()
        stack.callback(redis.kill)
        settings = WorkerSettings(
            home=folder / "home", redis_url=redis.url(), model_path=EMBEDDED_MODEL,
            database_url=self.postgres.empty(), **FAST,
        )  # fmt: skip
        self.store = stack.enter_context(Store.open(migrated(settings)))
        self.processes = Processes(folder, settings)
        # pytest shows it when the test failed
        stack.callback(lambda: sys.stderr.write(self.processes.logs()))
        stack.callback(self.processes.stop)
        self.gateways: dict[str, Host] = {name: network.host() for name in ("first", "second")}
        self.engines: dict[str, EngineProcess] = {}
        self.hosts: dict[str, Host] = {}
        for name in ("one", "two"):
            host = self.hosts[name] = network.host()
            serving = Serving(EMBEDDED_MODEL, "base", ENGINE_PORT, host.address)
            self.engines[name] = EngineProcess("embedded", serving, within=host.within)
        _, secret = self.store.keys.create("tester", Role.CLIENT)
        self.clients = {
            name: stack.enter_context(
                closing(Http(f"http://{host.address}:{GATEWAY_PORT}", secret, timeout=PATIENCE))
            )
            for name, host in self.gateways.items()
        }
        self._stack = stack
        self._seed = 0

    def start(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._stack.enter_context, self.engines.values()))
        for name, engine in self.engines.items():
            start_agent(self.processes, engine, name=name, within=self.hosts[name].within)
        self.processes.relay(within=self._worker.within)
        self.processes.worker("control", within=self._worker.within)
        for host in self.gateways.values():
            where = ("--host", host.address, "--port", str(GATEWAY_PORT))
            self.processes.start("service", *where, within=host.within)
        wait_until(lambda: self.ready() == {"one", "two"}, seconds=60, what="both replicas")
        for name, client in self.clients.items():
            wait_until(lambda: ready(client), seconds=60, what=f"the {name} gateway")  # noqa: B023

    def ready(self) -> set[str]:
        """The replicas that say so."""
        return {name for name, replica in replicas(self.store).items() if replica.ready}

    def ask(self, gateway: str, times: int = 8) -> list[str]:
        """The versions that answered as many different questions; raises if one was not answered in time."""

        def one(seed: int) -> str:
            image = b64encode(png(seed)).decode()
            answer = self.clients[gateway].post("/v1/vqa", {"image": image, "question": "is it?"})
            return str(answer["provenance"]["adapter"])

        self._seed += times
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(one, range(self._seed, self._seed + times)))

    def asked(self) -> dict[str, float]:
        """How many questions each engine has answered, as it says."""
        return {name: engine.metric("vllm:request_success_total") for name, engine in self.engines.items()}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    require_hosts()
    with ExitStack() as stack:
        network = stack.enter_context(Network())
        hosts = Hosts(tmp_path, network, stack)
        hosts.start()
        yield hosts


def test_partitions(hosts: Hosts, folders: list[Path], probes: list[Any]) -> None:
    """Of a gateway from an engine, and of an agent from the database."""
    store, network = hosts.store, hosts.network
    first, second = (
        register(store, EMBEDDED_MODEL, *each).name for each in zip(folders[:2], probes[:2], strict=True)
    )
    succeeded(store, release(store, first), seconds=90)
    # The first gateway last: its connections to both engines, kept for two seconds, are what breaks.
    for gateway in ("second", "first"):
        wait_until(lambda: set(hosts.ask(gateway)) == {first}, what="the new version")  # noqa: B023

    # The first gateway cannot reach the engine that it used just now: the other one answers for it.
    before = hosts.asked()
    with network.cut(hosts.gateways["first"], hosts.hosts["one"]):
        for gateway in ("first", "second", "first"):
            assert hosts.ask(gateway) == [first] * 8
        assert hosts.ready() == {"one", "two"}, "nobody else noticed"
        during = hosts.asked()
        assert during["two"] - before["two"] >= 16
    wait_until(
        lambda: hosts.ask("first") and hosts.asked()["one"] > during["one"],
        seconds=60,
        what="the first gateway using the engine again",
    )

    # An agent cannot reach the database: what its engine holds stays as it is, and the rest goes on.
    with network.cut_from_here(hosts.hosts["two"], hosts.postgres.port):
        wait_until(lambda: hosts.ready() == {"one"}, seconds=60, what="the silence being noticed")
        wait_until(
            lambda: "the store is away: DatabaseUnavailable" in hosts.processes.logs(),
            seconds=60,
            what="its word",
        )
        succeeded(store, release(store, second), seconds=90)
        for gateway in hosts.clients:
            wait_until(lambda: set(hosts.ask(gateway)) == {second}, what="the new version")  # noqa: B023
        assert hosts.engines["two"].adapters() == {first}
        assert hosts.engines["one"].adapters() == {first, second}
    whole = {first, second}
    wait_until(
        lambda: hosts.ready() == {"one", "two"} and loaded_by_each(store) == {"one": whole, "two": whole},
        seconds=60,
        what="both replicas",
    )
    assert hosts.engines["two"].adapters() == whole
