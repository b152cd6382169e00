"""A real engine, embedded or vLLM, as a process on a fixed port, so that it can come back after its death."""

import asyncio
import contextlib
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from hscr.engine import EngineClient
from hscr.errors import HscrError
from hscr.gateway_http import Http
from hscr.serving import EngineKind, Serving
from tests.waiting import wait_until

START_SECONDS = 240


class EngineProcess:
    """Started and killed by hand, or by `with`. What it prints is shown beside a test that fails."""

    def __init__(self, kind: EngineKind, serving: Serving, *options: str, within: Sequence[str] = ()) -> None:
        """within: what runs a command on the host of a test (tests/workers/hosts.py)."""
        self.kind = kind
        self.model = serving.name
        self.folder = serving.model
        self.address = f"http://{serving.host}:{serving.port}"
        self._command = serving.command(kind)
        self._options = options
        self._within = within
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it was never started"
        return self._process

    def start(self) -> None:
        """Returns once it answers."""
        environment = os.environ | self._command.environment
        command = [*self._within, *self._command.arguments, *self._options]
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        wait_until(self._answers, seconds=START_SECONDS, what=f"the start of {self.kind}")

    def kill(self) -> None:
        """All of it: the process of vLLM's that computes outlives the one that speaks HTTP."""
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Alive and silent; it may be killed meanwhile."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            if self.process.poll() is None:
                self._signal(signal.SIGCONT)

    def metrics(self) -> dict[str, float]:
        """Every sample by name and labels, as `name{labels}`."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")
        }

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all samples of `name` that carry these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            value
            for sample, value in self.metrics().items()
            if sample.split("{")[0] == name and all(label in sample for label in wanted)
        )

    def adapters(self) -> set[str]:
        return {model.id for model in self.ask("models") if model.parent}

    def load(self, name: str, folder: Path) -> None:
        self.ask("load_adapter", name, folder)

    def unload(self, name: str) -> None:
        self.ask("unload_adapter", name)

    def ask(self, method: str, *arguments: Any) -> Any:
        """One call of the engine's client."""

        async def call() -> Any:
            async with EngineClient(self.address) as client:
                return await getattr(client, method)(*arguments)

        return asyncio.run(call())

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"{self.kind} ended with status {self.process.returncode}"
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as reply:
                return reply.status == 200
        except urllib.error.URLError:
            return False


def ready(gateway: Http) -> bool:
    """Whether it takes questions."""
    try:
        gateway.get("/readyz")
    except HscrError:
        return False
    return True
