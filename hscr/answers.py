"""What a model, with or without an adapter, says to the questions of a suite. Imports torch."""

import io
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from PIL import Image

from hscr.config import EvaluateConfig
from hscr.contrast.dependence import Said, visual_dependence
from hscr.evaluate.suites import Suite
from hscr.models.vlm import VLM

_BATCH = 32


class Answered(NamedTuple):
    answers: dict[str, str]
    """greedy, by item"""
    dependence: dict[str, float]
    """visual dependence of the true answers to some items, in nats"""


def answer(
    vlm: VLM,
    adapter: str | None,
    suite: Suite,
    config: EvaluateConfig,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> Answered:
    """The whole suite; the same items and masks whatever the adapter. None is the base model."""
    answers: dict[str, str] = {}
    for start in range(0, len(suite.items), _BATCH):
        batch = suite.items[start : start + _BATCH]
        pictures = {item.image_digest: open_png(item.image_png) for item in batch}
        texts = greedy(vlm, [(item.question, item.image_digest) for item in batch], pictures, adapter)
        answers |= {item.id: text for item, text in zip(batch, texts, strict=True)}
        on_progress(len(answers))
    return Answered(answers, _dependence(vlm, adapter, suite, config))


def greedy(
    vlm: VLM, asked: Sequence[tuple[str, str]], pictures: Mapping[str, Image.Image], adapter: str | None
) -> list[str]:
    """Answers to (question, key of its picture)."""
    tokens = vlm.encode(pictures)
    with vlm.use(adapter), torch.inference_mode():
        prompts = [vlm.prompt_ids(text) for text, _ in asked]
        return vlm.generate_greedy(vlm.prefill(vlm.embed(prompts, [tokens[key] for _, key in asked])))


def open_png(png: bytes) -> Image.Image:
    """The picture, decoded when it is first looked at."""
    return Image.open(io.BytesIO(png))


def _dependence(vlm: VLM, adapter: str | None, suite: Suite, config: EvaluateConfig) -> dict[str, float]:
    count = min(config.dependence_questions, len(suite.items))
    items = random.Random(config.seed).sample(suite.items, count)  # noqa: S311
    said = [Said(item.image_digest, open_png(item.image_png), item.question, item.truth) for item in items]
    values = visual_dependence(
        vlm, said, adapter=adapter, rate=config.drop_rate, masks=config.dependence_masks, seed=config.seed
    )
    return {item.id: value for item, value in zip(items, values, strict=True)}
