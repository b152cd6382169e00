"""Preference records for the tiny model, and what runs on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hscr.config import FinetuneConfig
from hscr.learn.trainer import FinetuneResult, Metrics, finetune
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord, Response
from tests.tiny_llava import picture

CONFIG = FinetuneConfig(rank=4, epochs=15, batch_size=4, learning_rate=5e-3)
CHOSEN = ["yes, left", "a small nodule", "the right lung", "no"]
REJECTED = [
    ("no, right", "yes, right"),
    ("a large nodule",),
    ("the left lung", "the left brain", "the left"),
    ("yes",),
]


def record(i: int) -> PreferenceRecord:
    return PreferenceRecord(
        id=f"pref_{i}",
        image_digest=f"image{i // 2}",
        study="s",
        question=["is it?", "what does this image show?"][i % 2],
        chosen=CHOSEN[i % 4],
        rejected=tuple(
            Response(text=text, similarity=0.5 - 0.1 * level, mean_probability=0.1)
            for level, text in enumerate(REJECTED[i % 4])
        ),
        source=f"fb_{i}",
        method="hscr",
        model_digest="m",
        config_digest="c",
        consent=True,
    )


def records(count: int = 8) -> list[tuple[PreferenceRecord, Image.Image]]:
    """With one, two or three dispreferred answers; two of them share each image."""
    return [(record(i), picture(i // 2)) for i in range(count)]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def weights(folder: Path) -> Tensor:
    """All of an adapter's weights in one row."""
    return torch.cat(
        [value.flatten() for _, value in sorted(load_file(folder / "adapter_model.safetensors").items())]
    )


def run(
    vlm: VLM, config: FinetuneConfig, out: Path, *, pairs: Any = None, **options: Any
) -> tuple[FinetuneResult, list[Metrics]]:
    """The result and every step's metrics."""
    history: list[Metrics] = []
    follow: Callable[[int, int, Metrics], None] = lambda _step, _steps, metrics: history.append(metrics)  # noqa: E731
    result = finetune(vlm, pairs or records(), config, out_dir=out, on_progress=follow, **options)
    return result, history
