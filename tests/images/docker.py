"""The engine that `make test-images` runs the tests with."""

import json
import os
import subprocess
from typing import Any

from hscr import __version__

# As a cluster with restricted pods runs them.
CONFINED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


def image(target: str) -> str:
    return f"hscr-{target}:{__version__}"


def docker(*arguments: str, seconds: float = 120) -> str:
    """What it prints. Fails with what it complained about."""
    done = subprocess.run(
        [os.environ["DOCKER"], *arguments], capture_output=True, text=True, check=False, timeout=seconds
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout.strip()


def inspect(kind: str, name: str) -> Any:
    return json.loads(docker(kind, "inspect", name))[0]


def run(target: str, *command: str) -> str:
    """What a command prints in a confined container without a network."""
    return docker("run", "--rm", "--network", "none", *CONFINED, image(target), *command)


def python(target: str, script: str) -> Any:
    """What a script there says, as JSON."""
    return json.loads(run(target, "python", "-c", script))
