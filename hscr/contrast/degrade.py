"""What the model is made to overlook: visual tokens (HSCR §3.1), or what the ablations drop."""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hscr.config import DegradeConfig
from hscr.models.language import View
from hscr.models.vlm import VLM


class Seen(NamedTuple):
    """An image as one source shows it."""

    key: tuple[object, ...]
    """names the random draw: equal keys drop the same on any machine and beside any batch mates"""
    image: Image.Image
    tokens: Tensor
    """[N, d]: all its visual tokens"""


def seeded(*parts: object) -> torch.Generator:
    """A CPU random generator that depends on nothing but the named parts."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def kept_tokens(count: int, rate: float, *key: object) -> Tensor:
    """Ascending indices of exactly round((1 - rate) * count) visual tokens, drawn without replacement."""
    kept = round((1 - rate) * count)
    return torch.randperm(count, generator=seeded(*key))[:kept].sort().values


def degrade(
    visual: Tensor,
    rate: float,
    mode: Literal["delete", "zero", "attn_mask"],
    *key: object,
    positions: Literal["reindex", "keep_original"] = "reindex",
) -> View:
    """Visual tokens [N, d] less the share `rate` of them, in their order.

    A token that attention cannot see influences nothing but the positions of those behind it, so
    `attn_mask` is `delete` with every other token where it was.
    """
    kept = kept_tokens(len(visual), rate, *key).to(visual.device)
    if mode == "zero":
        zeroed = torch.zeros_like(visual)
        zeroed[kept] = visual[kept]
        return View.whole(zeroed)
    if mode == "attn_mask" or positions == "keep_original":
        return View(visual[kept], kept, len(visual))
    return View.whole(visual[kept])


def degraded(vlm: VLM, items: Sequence[Seen], config: DegradeConfig) -> list[View]:
    """Each image as the branch that overlooks sees it; at rate 0 as it is, bit for bit."""
    if config.rate == 0:
        return [View.whole(item.tokens) for item in items]
    if config.kind == "visual_token":
        drop = partial(degrade, positions=config.positions)
        return [drop(item.tokens, config.rate, config.mode, *item.key) for item in items]
    return {"pixel": _cropped, "patch": _patched, "latent": _masked}[config.kind](vlm, items, config)


def cropped(image: Image.Image, rate: float, *key: object) -> Image.Image:
    """A random part of the image, of its shape and 1 - rate of its area, one pixel at least."""
    side = (1 - rate) ** 0.5
    width, height = (max(1, round(side * extent)) for extent in image.size)
    x, y = torch.rand(2, generator=seeded(*key)).tolist()
    left, top = round(x * (image.width - width)), round(y * (image.height - height))
    return image.crop((left, top, left + width, top + height))


def visible_entries(count: int, rate: float, *key: object) -> Tensor:
    """[count, count] bool: attention entries but exactly round(rate * count * (count - 1)).

    The diagonal is always among those left, so that every token sees something.
    """
    others = (~torch.eye(count, dtype=torch.bool)).nonzero()
    hidden = others[torch.randperm(len(others), generator=seeded(*key))[: round(rate * len(others))]]
    visible = torch.ones(count, count, dtype=torch.bool)
    visible[hidden[:, 0], hidden[:, 1]] = False
    return visible


def _cropped(vlm: VLM, items: Sequence[Seen], config: DegradeConfig) -> list[View]:
    images = [cropped(item.image, config.rate, *item.key) for item in items]
    return [View.whole(tokens) for tokens in vlm.visual_tokens(vlm.pixel_values(images))]


def _patched(vlm: VLM, items: Sequence[Seen], config: DegradeConfig) -> list[View]:
    """Patches are dropped before the tower; the class token and every position embedding stay."""
    vision = vlm.vision
    embedded = vision.embed(vlm.pixel_values([item.image for item in items]))
    patches = embedded.shape[1] - 1
    kept = torch.stack([kept_tokens(patches, config.rate, *item.key) for item in items])
    columns = torch.nn.functional.pad(kept + 1, (1, 0)).to(embedded.device)
    rows = torch.arange(len(items), device=embedded.device)[:, None]
    tokens = vision.tokens(embedded[rows, columns])
    if config.positions == "reindex":
        return [View.whole(shown) for shown in tokens]
    at = columns - 1 + vision.class_tokens
    own = at[:, 1 - vision.class_tokens :]
    return [
        View(shown, where, patches + vision.class_tokens) for shown, where in zip(tokens, own, strict=True)
    ]


def _masked(vlm: VLM, items: Sequence[Seen], config: DegradeConfig) -> list[View]:
    """One mask per image, for every layer and head of the tower."""
    vision = vlm.vision
    embedded = vision.embed(vlm.pixel_values([item.image for item in items]))
    masks = [visible_entries(embedded.shape[1], config.rate, *item.key) for item in items]
    visible = torch.stack(masks).to(embedded.device)
    return [View.whole(tokens) for tokens in vision.tokens(embedded, visible)]
