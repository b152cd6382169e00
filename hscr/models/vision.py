"""The inside of a CLIP vision tower and the projector behind it, for what has to be dropped on the way."""

from typing import Any, Self

import torch
from torch import Tensor


class Vision:
    """Tower and projector of a LLaVA, in steps.

    `tokens(embed(pixels))` equals the model's own image features, without the layers whose output they do
    not use.
    """

    def __init__(self, tower: Any, projector: Any, config: Any) -> None:
        """config: the LLaVA's."""
        self._tower = tower
        self._projector = projector
        layer = config.vision_feature_layer
        states = len(tower.encoder.layers) + 1
        self._wanted = [index % states for index in ([layer] if isinstance(layer, int) else layer)]
        self._extra = int(config.vision_feature_select_strategy == "full")
        self._patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    @classmethod
    def of(cls, model: Any) -> Self:
        """That of a whole LlavaForConditionalGeneration."""
        return cls(model.model.vision_tower, model.model.multi_modal_projector, model.config)

    @property
    def device(self) -> torch.device:
        return self._tower.device

    @property
    def dtype(self) -> torch.dtype:
        return self._tower.dtype

    @property
    def parameters(self) -> int:
        """How many numbers tower and projector hold."""
        return sum(p.numel() for part in (self._tower, self._projector) for p in part.parameters())

    @property
    def count(self) -> int:
        """N: visual tokens of one image after the projector."""
        return self._patches + self._extra

    @property
    def class_tokens(self) -> int:
        """Visual tokens that are no patch: 1 where the strategy is `full`, else 0."""
        return self._extra

    @torch.no_grad()
    def embed(self, pixel_values: Tensor) -> Tensor:
        """[B, 1 + P, d]: class token and patches of pixels [B, 3, H, W], with their position embeddings."""
        return self._tower.pre_layrnorm(self._tower.embeddings(pixel_values))

    @torch.no_grad()
    def tokens(self, embedded: Tensor, visible: Tensor | None = None) -> Tensor:
        """[B, class_tokens + n, d']: projected visual tokens of embedded [B, 1 + n, d], n of any size.

        visible: [B, 1 + n, 1 + n] bool, True where a query (row) may attend to a key (column), the same in
        every layer and head. No row may be empty: softmax over nothing is NaN.
        """
        mask = None if visible is None else _added(visible, embedded.dtype)
        states = [embedded]
        for layer in self._tower.encoder.layers[: max(self._wanted)]:
            states.append(layer(states[-1], mask))
        features = torch.cat([states[index] for index in self._wanted], dim=-1)
        return self._projector(features[:, 1 - self._extra :])


def _added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, S, S] added to attention scores, which every implementation of attention understands."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).where(visible, -torch.inf)[:, None]
