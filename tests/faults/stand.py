"""The product under its own supervisor, and points at which each of its processes dies."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from hscr.errors import EngineError, Overloaded, StoreError
from hscr.faults import BUILD, FOLDER, REACHED
from hscr.gateway_http import GatewayUnreachable, Http
from hscr.records import Role
from hscr.stack import Ports, Stack
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from tests.serving import ready
from tests.waiting import wait_until
from tests.workers.harness import FAST, state

T = TypeVar("T")

SECONDS = 240.0
"""The longest wait for anything: deaths, leases and restarts on a machine that is slow."""

SETTINGS = {
    **FAST,
    "retry_seconds": 0.5,
    "unload_grace_seconds": 0.2,
    "keep_temporary_seconds": 3,
    "check_store_seconds": 0.5,
    "canary_seconds": 0.3,
    "image_ttl_hours": 1e-6,  # what is asked without consent expires at once
    "consider_seconds": 3600,
    "checkpoint_every": 2,
}

_SIGNS = {
    "gpu-child": "workers.gpu_child",
    "worker-gpu": "generate,score,finetune",
    "worker-control": "control,evaluate",
    "relay": "workers.outbox",
    "agent": "workers.agent",
    "engine": "service.embedded",
    "gateway": "-m service ",
    "beat": " beat",
}
"""What of its command line tells a process."""


class Death(NamedTuple):
    point: str
    process: str
    pid: int


class Stand:
    """All processes, a store to look into, and clients of each role. Use with `with`."""

    def __init__(self, folder: Path) -> None:
        self.faults = folder / "faults"
        self.faults.mkdir()
        self.home = folder / "home"
        settings = {f"HSCR_{name.upper()}": str(value) for name, value in SETTINGS.items()}
        self.stack = Stack(
            self.home,
            ports=Ports(gateway=0),
            settings={**settings, FOLDER: str(self.faults), BUILD: "1", "OMP_NUM_THREADS": "1"},
        )
        self.turns = 0

    def __enter__(self) -> Self:
        self.stack.start()
        # A server's URL in the environment is what the stack's processes were given, too.
        url = os.environ.get("HSCR_DATABASE_URL")
        self.store = Store.open(StoreSettings(home=self.home, database_url=url))
        consenting = {"train_consent": True}
        self.reviewer = self._client("reviewer", Role.REVIEWER, **consenting)
        self.operator = self._client("operator", Role.OPERATOR)
        self.passer_by = self._client("passer-by", Role.CLIENT)
        return self

    def __exit__(self, *_: object) -> None:
        for client in (self.reviewer, self.operator, self.passer_by):
            client.close()
        self.store.close()
        self.stack.stop()

    def _client(self, name: str, role: Role, **policy: bool) -> Http:
        _, secret = self.store.keys.create(name, role, **policy)
        return Http(self.stack.url, secret, timeout=60)

    # -- faults --------------------------------------------------------------------------------------------

    @contextmanager
    def dying(self, *points: str) -> Iterator[list[Death]]:
        """Whoever passes each point in the block dies there, once; all must be reached."""
        for point in points:
            self._arm(point, signal.SIGKILL)
        deaths: list[Death] = []
        try:
            yield deaths
            with suppress(AssertionError):  # who is left is named below
                self.passed(*points)
        finally:
            never = self._armed(points)
            for point in never:
                (self.faults / point).unlink()
        assert not never, f"never reached: {', '.join(never)}"
        deaths += [self._death(point) for point in points]

    @contextmanager
    def at(self, point: str, action: Callable[[], None]) -> Iterator[None]:
        """Whoever passes `point` in the block stands still there, once, while `action` is done."""
        reached = self.faults / f"{point}{REACHED}"
        self._arm(point, signal.SIGSTOP)

        def act() -> None:
            wait_until(lambda: reached.exists() and reached.read_text(), seconds=SECONDS, what=point)
            pid = self._death(point).pid
            wait_until(lambda: state(pid) == "T", what=f"whoever reached {point} standing still")
            try:
                action()
            finally:
                os.kill(pid, signal.SIGCONT)

        with ThreadPoolExecutor(1) as thread:
            acted = thread.submit(act)
            yield
            acted.result()

    def passed(self, *points: str) -> None:
        """Wait until those of the points that are armed were reached."""
        wait_until(lambda: not self._armed(points), seconds=60, what=f"someone at {', '.join(points)}")

    def _arm(self, point: str, number: signal.Signals) -> None:
        (self.faults / f"{point}{REACHED}").unlink(missing_ok=True)
        aside = self.faults / f"{point}.aside"
        aside.write_text(number.name)
        aside.rename(self.faults / point)

    def _armed(self, points: tuple[str, ...]) -> list[str]:
        return [point for point in points if (self.faults / point).exists()]

    def _death(self, point: str) -> Death:
        pid, command = (self.faults / f"{point}{REACHED}").read_text().split(" ", 1)
        process = next(name for name, sign in _SIGNS.items() if sign in f"{command} ")
        return Death(point, process, int(pid))

    def empty_redis(self) -> None:
        """As a queue without a disk that is restarted: its messages are gone, and all connections."""
        pid = self.stack.pid("redis")
        assert pid is not None
        log = self.stack.home / "redis" / "appendonlydir"
        log.rename(log.with_name(f"forgotten-{time.monotonic_ns()}"))
        os.kill(pid, signal.SIGKILL)

    # -- requests ------------------------------------------------------------------------------------------

    def insist(self, call: Callable[[], T]) -> T:
        """What a client does whose connection broke or who was told to come back: the same again."""
        found: list[T] = []

        def answered() -> bool:
            try:
                found.append(call())
            except (GatewayUnreachable, EngineError, Overloaded, StoreError):
                return not wait_until(
                    lambda: ready(self.operator), seconds=SECONDS, what="a gateway that is ready"
                )
            return True

        wait_until(answered, seconds=SECONDS, what="an answer of the gateway")
        return found[0]

    def post(self, client: Http, path: str, body: dict[str, Any], key: str) -> dict[str, Any]:
        return self.insist(lambda: client.post(path, body, idempotency_key=key))

    def streamed(self, client: Http, path: str, body: dict[str, Any], key: str) -> dict[str, Any]:
        """The last event's data: the kept answer."""

        def call() -> dict[str, Any]:
            events = list(client.events("POST", path, json=body, headers={"Idempotency-Key": key}))
            if not events or events[-1].name != "answer":
                raise GatewayUnreachable("The stream broke off.")
            return events[-1].data

        return self.insist(call)

    def logs(self) -> str:
        logs = sorted((self.stack.home / "logs").glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-6000:]}" for log in logs)
