"""A real HTTP server that speaks S3's protocol, on a port of its own; what it keeps is in its memory.

moto answers whoever asks, so what a store refuses to a wrong key is not tried with it.
"""

import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any, Self

import httpx2

from hscr.probes import http_ok
from tests.redis_server import free_port
from tests.waiting import wait_until

_NAMES = count()


class S3Server:
    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._log = folder / "s3.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: http_ok(f"{self.endpoint}/moto-api/"), seconds=60, what="the object store")
        return self

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def bucket(self) -> dict[str, Any]:
        """The settings of a store in an empty bucket."""
        name = f"bucket-{next(_NAMES)}"
        httpx2.put(f"{self.endpoint}/{name}").raise_for_status()
        return {
            "blobs_url": f"s3://{name}/here",
            "s3_endpoint": self.endpoint,
            "s3_region": "us-east-1",
            "s3_access_key_id": "hscr",
            "s3_secret_access_key": "a secret of the tests",
        }
