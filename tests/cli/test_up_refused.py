"""What `hscr up` says when it cannot start, and that it then leaves nothing running."""

import fcntl
import socket
from pathlib import Path

import pytest

from hscr.errors import HscrError
from hscr.stack import Ports, Stack
from tests.cli.running import hscr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = hscr("up", "--home", str(tmp_path), "--port", str(port))
    assert done.returncode == 2
    assert f"Port {port}" in done.stderr
    assert "the gateway" in done.stderr
    assert "→ " in done.stderr


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    done = hscr("up", "--home", str(tmp_path), "--port", "0", "--model", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "holds no config.json" in done.stderr


def test_a_missing_vllm_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    command = f"{tmp_path}/bin/python -m vllm"
    done = hscr("up", "--home", str(tmp_path), "--port", "0", "--engine", "vllm", HSCR_VLLM_COMMAND=command)
    assert done.returncode == 2
    assert "vLLM is not installed" in done.stderr
    assert "make .venv-vllm/ready" in done.stderr
    assert not (tmp_path / "logs").exists(), "nothing was started"


def test_a_process_that_ends_at_once_shows_its_log_and_stops_the_others(tmp_path: Path) -> None:
    # Off loopback the gateway refuses to run without any API key.
    stack = Stack(tmp_path, ports=Ports(gateway=0), host="0.0.0.0")
    with pytest.raises(HscrError, match="hscr keys create") as caught:
        stack.start()
    assert "gateway process ended" in caught.value.detail
    assert stack.members() == []
    assert all(stack.pid(name) is None for name in stack.names)
    with (tmp_path / "stack.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again
