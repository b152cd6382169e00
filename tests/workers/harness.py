"""What the tests of the workers do again and again."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hscr.config import GenerateConfig
from hscr.records import Job, JobState, PreferenceRecord, PreferenceSource, Response
from hscr.store.answers import hold_image
from hscr.store.database import Database
from hscr.store.preferences import add_record
from hscr.store.store import Store
from tests.waiting import wait_until
from workers.contract import PAYLOADS, Payload
from workers.settings import WorkerSettings

FAST: dict[str, Any] = {
    "lease_seconds": 4.0,
    "heartbeat_seconds": 0.2,
    "relay_seconds": 0.05,
    "sweep_seconds": 0.5,
    "unclaimed_seconds": 2.0,
    "replica_seen_seconds": 5.0,
    "gateway_seen_seconds": 2.0,
    "rollout_seconds": 60.0,
    "torch_threads": 1,
    "write_every": 4,
}

# Random substitutes need no plausible answer, which a model of random weights has not.
RANDOM = GenerateConfig.parse({"substitute": {"negatives": "random"}, "rerank": {"gap": 0.0}})
ANSWERS = (
    "yes, there is a small nodule in the left lung.",
    "no, the right lung is clear.",
    "a large effusion on the right.",
    "brain mr with an infarct in the left hemisphere.",
)


def migrated(settings: WorkerSettings) -> WorkerSettings:
    """The settings, once their database has its tables."""
    database = Database(settings.database)
    database.upgrade()
    database.close()
    return settings


class Processes:
    """The processes of one test, each with a log; none outlives the test."""

    def __init__(self, folder: Path, settings: WorkerSettings) -> None:
        self._folder = folder
        self._settings = settings
        self._running: list[subprocess.Popen[bytes]] = []
        self._number = count()

    def start(
        self, *arguments: str, within: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[bytes]:
        """`python -m ARGUMENTS` with the settings as its environment."""
        values = self._settings.model_dump(exclude_none=True)
        given = {f"HSCR_{name.upper()}": str(value) for name, value in values.items()}
        name = f"{next(self._number)}-{arguments[0]}.log"
        with (self._folder / name).open("wb") as log:
            process = subprocess.Popen(
                [*within, sys.executable, "-m", *arguments],
                env={**os.environ, **given, **environment},
                stdout=log,
                stderr=log,
            )
        self._running.append(process)
        return process

    def relay(self, **options: Any) -> subprocess.Popen[bytes]:
        return self.start("workers.outbox", **options)

    def worker(self, queues: str, concurrency: int = 1, **options: Any) -> subprocess.Popen[bytes]:
        arguments = ["--pool=threads", f"--concurrency={concurrency}", "-Q", queues, "-l", "INFO"]
        lean = ["--without-gossip", "--without-mingle", "-n", f"w{next(self._number)}@test"]
        return self.start("celery", "-A", "workers.app", "worker", *arguments, *lean, **options)

    def beat(self, **environment: str) -> subprocess.Popen[bytes]:
        return self.start("celery", "-A", "workers.app", "beat", "-l", "INFO", **environment)

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in sorted(self._folder.glob("*.log")))

    def stop(self) -> None:
        for process in self._running:
            process.send_signal(signal.SIGTERM)
        for process in self._running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def submit(store: Store, payload: Payload) -> Job:
    kind = next(kind for kind, payload_type in PAYLOADS.items() if type(payload) is payload_type)
    return store.jobs.submit(Job(kind=kind, payload=payload.stored()))


def finished(store: Store, job: Job, seconds: float = 40) -> Job:
    """The job as it ended."""
    wait_until(lambda: store.jobs.get(job.id).state.final, seconds=seconds, what=f"the end of {job.kind}")
    return store.jobs.get(job.id)


def succeeded(store: Store, job: Job, seconds: float = 40) -> Job:
    ended = finished(store, job, seconds)
    assert ended.state is JobState.SUCCEEDED, ended.error
    return ended


def states(store: Store, job: Job) -> list[str]:
    """The states a job went through, from its events."""
    return [event.data["state"] for event in store.jobs.events(job.id) if event.type == "state"]


def gpu_child(worker_pid: int) -> int | None:
    """The worker's child that has loaded torch."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == worker_pid and b"workers.gpu_child" in command:
            return int(entry.name)
    return None


def state(pid: int) -> str:
    """As ps shows it; T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    with contextlib.suppress(FileNotFoundError):
        return state(pid) != "Z"
    return False


def progress(store: Store, job: Job) -> int:
    """How far a job says it is."""
    return max((event.data.get("done", 0) for event in store.jobs.events(job.id)), default=0)


def png(seed: int, size: int = 32) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def add_sources(store: Store, number: int, *, start: int = 0) -> list[PreferenceSource]:
    """Consented sources, four to an image and study, with their images."""
    digests = {index: store.blobs.put(png(index)) for index in {i // 4 for i in range(start, start + number)}}
    with store.database.write() as connection:
        for index, digest in digests.items():
            hold_image(connection, digest, f"study-{index}", None)
    sources = [
        PreferenceSource(
            id=f"src_{index:04}", image_digest=digests[index // 4], study=f"study-{index // 4}",
            question="what does this image show?", chosen=ANSWERS[index % len(ANSWERS)], consent=True,
        )
        for index in range(start, start + number)
    ]  # fmt: skip
    store.preferences.add_sources(sources)
    return sources


def make_adapter(model: Path, folder: Path, *, seed: int, scale: float = 0.3) -> Path:
    """A saved adapter of rank 4 with random weights; `scale` 0 leaves the model as it is."""
    import torch

    from hscr.config import FinetuneConfig
    from hscr.models.vlm import VLM

    vlm = VLM.load(model)
    generator = torch.Generator().manual_seed(seed)
    with vlm.with_lora(FinetuneConfig(rank=4, seed=seed)) as parameters:
        for parameter in parameters.values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        vlm.adapters.save("trainee", folder)
    return folder


def make_records(store: Store, number: int) -> list[PreferenceRecord]:
    """Consented records of method `random`, with their sources."""
    records = [
        PreferenceRecord(
            **source.model_dump(exclude={"id"}),
            id=f"pref_{source.id}",
            source=source.id,
            method="random",
            rejected=(Response(text=ANSWERS[(index + 1) % 4], similarity=0.5, mean_probability=0.1),),
            model_digest="m",
            config_digest="c",
        )
        for index, source in enumerate(add_sources(store, number))
    ]
    with store.database.write() as connection:
        for record in records:
            add_record(connection, record)
    return records
