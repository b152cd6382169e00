"""Images to projected visual tokens: what a LLaVA does before its language model reads anything."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hscr.models.vision import Vision


class Sight:
    """The half of a model that sees."""

    processor: Any
    vision: Vision
    """tower and projector"""
    device: torch.device
    tokens_at_once: int
    """bounds how many images share a pass"""

    @property
    def image_token_count(self) -> int:
        """N: visual tokens of one image after the projector."""
        return self.vision.count

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """[B, 3, H, W], resized and normalised as the model's processor says."""
        rgb = [image.convert("RGB") for image in images]
        pixels = self.processor.image_processor(images=rgb, return_tensors="pt")["pixel_values"]
        return pixels.to(self.device, self.vision.dtype)

    @torch.no_grad()
    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """[B, N, d]: visual tokens after the projector, where HSCR drops them (HSCR §3.1)."""
        images = max(1, self.tokens_at_once // self.image_token_count)
        return torch.cat(
            [self.vision.tokens(self.vision.embed(some)) for some in torch.split(pixel_values, images)]
        )

    def encode(self, images: Mapping[str, Image.Image], batch_size: int = 32) -> dict[str, Tensor]:
        """Visual tokens [N, d] of each image, by the images' own keys."""
        found: dict[str, Tensor] = {}
        keys = list(images)
        for start in range(0, len(keys), batch_size):
            batch = keys[start : start + batch_size]
            tokens = self.visual_tokens(self.pixel_values([images[key] for key in batch]))
            found |= dict(zip(batch, tokens, strict=True))
        return found


def numeric_mode(device: torch.device, dtype: torch.dtype) -> str:
    """As provenance names it: `cpu/float32`."""
    return f"{device.type}/{str(dtype).removeprefix('torch.')}"
