"""A real object store: rclone serves a folder by S3's protocol, as the chart's small one does.

It checks keys, and what it keeps is still there when it starts again.
"""

import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any, Self

import httpx2

from tests.redis_server import free_port
from tests.waiting import wait_until

ACCESS_KEY_ID, SECRET_ACCESS_KEY = "hscr-tests", "a-secret+of/the=tests"
RCLONE = Path(sys.executable).parent / "rclone"
_NAMES = count()


class S3Server:
    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.host, self.port = host, free_port()
        self._buckets = folder / "buckets"
        self._buckets.mkdir()
        self._log = folder / "s3.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> Self:
        key = f'"{ACCESS_KEY_ID},{SECRET_ACCESS_KEY}"'
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [RCLONE, "serve", "s3", "--addr", f"{self.host}:{self.port}", self._buckets],
                env={**os.environ, "RCLONE_CONFIG": os.devnull, "RCLONE_AUTH_KEY": key},
                stdout=log,
                stderr=log,
            )
        wait_until(self._answers, seconds=60, what="the object store")
        return self

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            httpx2.get(self.endpoint)  # refused, without a key
        except httpx2.HTTPError:
            return False
        return True

    def bucket(self) -> dict[str, Any]:
        """The settings of a store in an empty bucket."""
        name = f"bucket-{next(_NAMES)}"
        key = f"access_key_id={ACCESS_KEY_ID},secret_access_key={SECRET_ACCESS_KEY}"
        client = f":s3,provider=Rclone,endpoint='{self.endpoint}',{key}:"
        subprocess.run(
            [RCLONE, "mkdir", f"{client}{name}"],
            env={**os.environ, "RCLONE_CONFIG": os.devnull}, check=True, capture_output=True,
        )  # fmt: skip
        return {
            "blobs_url": f"s3://{name}/here",
            "s3_endpoint": self.endpoint,
            "s3_region": "us-east-1",
            "s3_access_key_id": ACCESS_KEY_ID,
            "s3_secret_access_key": SECRET_ACCESS_KEY,
        }
