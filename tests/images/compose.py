"""`docker-compose` as docker-compose.yml is used: with its own .env, and only what a test sets besides."""

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / ".venv-images" / "bin" / "docker-compose"
PROFILES = ("embedded", "gpu", "observability", "tools")
ALONE = ("docker-compose.yml",)


def compose(
    *arguments: str,
    files: Sequence[str] = ALONE,
    environment: Mapping[str, str] | None = None,
    seconds: float = 120,
) -> str:
    """What it prints. Fails with what it complained about."""
    own = re.findall(r"^(\w+)=", (ROOT / ".env").read_text(), re.MULTILINE)
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    named = [word for file in files for word in ("--file", file)]
    done = subprocess.run(
        [str(PROGRAM), "--project-directory", str(ROOT), *named, *arguments],
        cwd=ROOT,
        env=inherited | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def configuration(
    *profiles: str, files: Sequence[str] = ALONE, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The files as Compose understands them; no engine is asked."""
    chosen = [word for profile in profiles for word in ("--profile", profile)]
    offline = {"DOCKER_HOST": "unix:///nonexistent.sock", **(environment or {})}
    return json.loads(compose(*chosen, "config", "--format", "json", files=files, environment=offline))
