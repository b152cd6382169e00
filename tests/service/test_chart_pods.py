"""What `helm test` runs in the cluster, against a real gateway and engine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hscr.records import Role
from tests.service.conftest import VERSIONS, Gateway

SCRIPTS = Path(__file__).parents[2] / "helm" / "files" / "tests"


def run(script: str, gateway: Gateway) -> subprocess.CompletedProcess[str]:
    key = gateway.key(Role.REVIEWER)["Authorization"].removeprefix("Bearer ")
    return subprocess.run(
        [sys.executable, str(SCRIPTS / f"{script}.py")],
        env={**os.environ, "HSCR_URL": gateway.url, "HSCR_API_KEY": key},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", ["health", "question", "versions"])
def test_what_serves_passes(gateway: Gateway, script: str) -> None:
    first, second = VERSIONS
    gateway.serve_version(first)
    gateway.serve_version(second)
    done = run(script, gateway)
    assert done.returncode == 0, done.stderr
    if script == "versions":
        assert {f"{name} → {name}" for name in (first, second, "base")} == set(done.stdout.splitlines())


@pytest.mark.parametrize("script", ["health", "question", "versions"])
def test_a_gateway_without_an_engine_does_not(serve, script: str) -> None:
    assert run(script, serve()).returncode != 0


def test_every_script_is_run() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == {"health", "question", "versions"}
