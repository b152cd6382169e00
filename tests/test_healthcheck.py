"""A container's health, as its exit status."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from hscr.healthcheck import SILENCE_SECONDS


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answering) as listening:
        threading.Thread(target=listening.serve_forever).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def check(what: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hscr.healthcheck", str(what)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_url_must_answer_well(server: str) -> None:
    assert check(f"{server}/200").returncode == 0
    refused = check(f"{server}/503")
    assert (refused.returncode, "503" in refused.stderr) == (1, True)


def test_nobody_there_is_unhealthy() -> None:
    assert check("http://127.0.0.1:1/").returncode == 1


def test_a_file_must_have_been_touched_lately(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    assert check(alive).returncode == 1
    alive.touch()
    assert check(alive).returncode == 0
    long_ago = time.time() - SILENCE_SECONDS - 5
    os.utime(alive, (long_ago, long_ago))
    silent = check(alive)
    assert (silent.returncode, "silent" in silent.stderr) == (1, True)
