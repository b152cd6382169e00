"""Visual dependence: how much the image changed the words of an answer. It explains nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from hscr.contrast.degrade import degrade
from hscr.errors import JobCancelled
from hscr.models.language import View
from hscr.models.vlm import VLM


@dataclass(frozen=True)
class Said:
    """A text about an image in answer to a question."""

    image_digest: str
    image: Image.Image
    question: str
    text: str


def visual_dependence(
    vlm: VLM,
    items: Sequence[Said],
    *,
    adapter: str | None,
    rate: float = 0.7,
    masks: int = 8,
    seed: int = 0,
    mode: Literal["delete", "zero"] = "delete",
    batch_size: int = 4,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Per item, in nats: mean over content tokens of log p(y_t | v) - log p(y_t | v dropped), over all masks.

    Masks depend on image, number and seed only, so that every version of a model is judged under the same
    ones. Content tokens hold a letter or digit and are not special; a text without any depends by 0.
    Raises InvalidQuestion, InvalidRecord for an unusable item, NotFound, JobCancelled.
    """
    visual = vlm.encode({item.image_digest: item.image for item in items})
    values: list[float] = []
    for start in range(0, len(items), batch_size):
        if should_stop():
            raise JobCancelled(f"Stopped after {start} texts.", remedy="Submit the job again.")
        batch = items[start : start + batch_size]
        with vlm.use(adapter), torch.inference_mode():
            drop = partial(dropped_views, rate=rate, masks=masks, seed=seed, mode=mode)
            values += _dependence(vlm, batch, visual, drop, masks)
    return values


def dropped_views(
    tokens: Tensor,
    image_digest: str,
    *,
    rate: float,
    masks: int,
    seed: int,
    mode: Literal["delete", "zero"],
) -> list[View]:
    """What each mask leaves of an image's visual tokens [N, d]. Depends on nothing but the arguments."""
    return [degrade(tokens, rate, mode, image_digest, mask, seed) for mask in range(masks)]


def _dependence(
    vlm: VLM,
    items: Sequence[Said],
    visual: dict[str, Tensor],
    drop: Callable[[Tensor, str], list[View]],
    masks: int,
) -> list[float]:
    prompts, texts = [], []
    views: list[View | Tensor] = []
    for item in items:
        tokens = visual[item.image_digest]
        views += [tokens, *drop(tokens, item.image_digest)]
        prompts += [vlm.prompt_ids(item.question)] * (masks + 1)
        texts += [[vlm.completion_ids(item.text)]] * (masks + 1)
    logprobs = [row for (row,) in vlm.completion_logprobs(vlm.prefill(vlm.embed(prompts, views)), texts)]
    content = vlm.vocabulary.content
    return [
        _mean_drop(torch.stack(logprobs[at : at + masks + 1]).cpu(), content[texts[at][0]])
        for at in range(0, len(texts), masks + 1)
    ]


def _mean_drop(logprobs: Tensor, content: Tensor) -> float:
    """logprobs [1 + masks, T], the full view first; content [T] bool."""
    drop = (logprobs[0] - logprobs[1:].mean(0))[content]
    return float(drop.mean()) if len(drop) else 0.0
