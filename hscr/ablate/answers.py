"""What a model with an adapter says to held-out questions. Imports torch."""

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from hscr.config import EvaluateConfig
from hscr.contrast.dependence import Said, visual_dependence
from hscr.evaluate.suites import Suite, SuiteItem
from hscr.models.vlm import VLM

_ADAPTER = "arm"
_BATCH = 32


class Answered(NamedTuple):
    answers: dict[str, str]
    """greedy, by item"""
    dependence: dict[str, float]
    """visual dependence of the true answers to some items, in nats"""


def answer(vlm: VLM, adapter: Path | None, suite: Suite, config: EvaluateConfig) -> Answered:
    """Whole suite, same items and masks whatever the adapter; None is the base model."""
    with _loaded(vlm, adapter) as name:
        return Answered(_greedy(vlm, name, suite), _dependence(vlm, name, suite, config))


@contextmanager
def _loaded(vlm: VLM, adapter: Path | None) -> Iterator[str | None]:
    if adapter is None:
        yield None
        return
    vlm.load_adapter(adapter, _ADAPTER)
    try:
        yield _ADAPTER
    finally:
        vlm.unload_adapter(_ADAPTER)


def _greedy(vlm: VLM, adapter: str | None, suite: Suite) -> dict[str, str]:
    found: dict[str, str] = {}
    for start in range(0, len(suite.items), _BATCH):
        batch = suite.items[start : start + _BATCH]
        tokens = vlm.encode({item.image_digest: _image(item) for item in batch})
        with vlm.use(adapter), torch.inference_mode():
            prompts = [vlm.prompt_ids(item.question) for item in batch]
            seen = vlm.prefill(vlm.embed(prompts, [tokens[item.image_digest] for item in batch]))
            texts = vlm.generate_greedy(seen)
        found |= {item.id: text for item, text in zip(batch, texts, strict=True)}
    return found


def _dependence(vlm: VLM, adapter: str | None, suite: Suite, config: EvaluateConfig) -> dict[str, float]:
    count = min(config.dependence_questions, len(suite.items))
    items = random.Random(config.seed).sample(suite.items, count)  # noqa: S311
    values = visual_dependence(
        vlm,
        [Said(item.image_digest, _image(item), item.question, item.truth) for item in items],
        adapter=adapter,
        rate=config.drop_rate,
        masks=config.dependence_masks,
        seed=config.seed,
    )
    return {item.id: value for item, value in zip(items, values, strict=True)}


def _image(item: SuiteItem) -> Image.Image:
    return Image.open(io.BytesIO(item.image_png))
