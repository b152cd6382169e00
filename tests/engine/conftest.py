"""Real engine processes on free ports, and real adapters for the model they serve."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hscr.config import FinetuneConfig
from hscr.engine import ChatRequest, EngineClient
from hscr.models.vlm import VLM
from hscr.records import Sampling
from tests.tiny_llava import build

ENGINES = ("embedded",)
START_SECONDS = 120


@dataclass(frozen=True)
class Running:
    """A started engine process."""

    address: str
    model: str
    folder: Path
    process: subprocess.Popen[str]

    def metrics(self) -> dict[str, float]:
        """Every sample by name and labels, as `name{labels}`."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")
        }

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all samples of `name` that carry these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [
            v for k, v in self.metrics().items() if k.split("{")[0] == name and all(w in k for w in wanted)
        ]
        return sum(found)


@contextmanager
def start(folder: Path, *options: str) -> Iterator[Running]:
    """`python -m service.embedded` on a free port, ready, and gone afterwards."""
    command = [
        sys.executable,
        "-m",
        "service.embedded",
        "--model",
        str(folder),
        "--port",
        "0",
        "--threads",
        "1",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        until(lambda: _healthy(told["address"]), START_SECONDS)
        yield Running(told["address"], told["model"], folder, process)
    finally:
        process.kill()
        process.wait()


def until(condition, seconds: float = 20.0) -> None:
    """Poll until `condition()` holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except urllib.error.URLError:
        return False


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture(scope="session", params=ENGINES)
def engine(request, model_folder) -> Iterator[Running]:
    with start(model_folder, "--served-model-name", "tiny", "--max-loras", "3") as running:
        yield running


@pytest.fixture
async def client(engine) -> AsyncIterator[EngineClient]:
    """A client of an engine without adapters, which it leaves without adapters."""
    async with EngineClient(engine.address) as client:
        yield client
        for model in await client.models():
            if model.parent:
                await client.unload_adapter(model.id)


@pytest.fixture(scope="session")
def vlm(model_folder) -> VLM:
    return VLM.load(model_folder)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, vlm) -> list[Path]:
    """Three saved adapters of rank 4 that change every answer, each in its own way."""
    return [
        save_adapter(vlm, tmp_path_factory.mktemp("adapters") / f"a{seed}", seed=seed) for seed in (1, 2, 3)
    ]


def save_adapter(vlm: VLM, folder: Path, *, seed: int, rank: int = 4) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with vlm.with_lora(FinetuneConfig(rank=rank, seed=seed)) as parameters:
        for parameter in parameters.values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        vlm.adapters.save("trainee", folder)
    return folder


def png(seed: int, size: int = 40) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def ask(
    question: str = "is there a nodule in the left lung?",
    image: int | None = 0,
    *,
    model: str = "tiny",
    top: int | None = None,
    **sampling,
) -> ChatRequest:
    settings = Sampling(**{"max_tokens": 12, **sampling})
    picture = None if image is None else png(image)
    return ChatRequest.ask(model, question, picture, sampling=settings, top_logprobs=top)
