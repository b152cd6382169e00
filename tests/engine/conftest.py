"""Real engine processes on free ports, and real adapters for the model they serve."""

import time
from collections.abc import AsyncIterator, Iterator
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
from hscr.serving import EngineKind, Serving
from tests.redis_server import free_port
from tests.serving import EngineProcess
from tests.tiny_llava import build

ENGINES = ("embedded", pytest.param("vllm", marks=pytest.mark.vllm))
Running = EngineProcess


def start(folder: Path, *options: str, kind: EngineKind = "embedded") -> EngineProcess:
    """An engine that serves `folder` as "tiny" on a free port inside `with`."""
    return EngineProcess(kind, Serving(folder, "tiny", free_port()), *options)


def until(condition, seconds: float = 20.0) -> None:
    """Poll until `condition()` holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("engine") / "tiny", width=128)


@pytest.fixture(scope="session")
def embedded(model_folder) -> Iterator[EngineProcess]:
    with start(model_folder, "--max-loras", "3") as running:
        yield running


@pytest.fixture(scope="session")
def vllm(model_folder) -> Iterator[EngineProcess]:
    with start(model_folder, "--max-loras", "3", kind="vllm") as running:
        yield running


@pytest.fixture(scope="session", params=ENGINES)
def engine(request) -> EngineProcess:
    """Each kind in turn; a file about one kind overrides this with that kind's fixture."""
    return request.getfixturevalue(request.param)


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


def save_adapter(vlm: VLM, folder: Path, *, seed: int, rank: int = 4, scale: float = 0.3) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with vlm.with_lora(FinetuneConfig(rank=rank, seed=seed)) as parameters:
        for parameter in parameters.values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
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
