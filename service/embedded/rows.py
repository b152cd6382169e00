"""Sequences that decode together: one key-value cache, padded on the left to a common length."""

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from hscr.models.vlm import VLM
from service.embedded.sequences import Sequence


class Rows:
    """B sequences of one adapter. mask: [B, L] bool, False on padding; the cache holds L positions."""

    def __init__(self, sequences: list[Sequence], mask: Tensor, cache: DynamicCache) -> None:
        self.sequences = sequences
        self.mask = mask
        self.cache = cache

    @classmethod
    def prefill(cls, vlm: VLM, sequences: list[Sequence], visual: list[Tensor | None]) -> tuple[Self, Tensor]:
        """Read the prompts. Returns the rows and fp32 log-probabilities [B, V] of their first tokens."""
        context = vlm.prefill(vlm.embed([sequence.prompt.ids for sequence in sequences], visual))
        return cls(sequences, context.mask, context.cache), vlm.logits(context.last).log_softmax(-1)

    def step(self, vlm: VLM) -> Tensor:
        """Read each sequence's last token. Returns fp32 log-probabilities [B, V] of the next ones."""
        ids = torch.tensor([[sequence.last_id] for sequence in self.sequences], device=vlm.device)
        positions = self.mask.sum(-1, keepdim=True)
        self.mask = pad(self.mask, (0, 1), value=True)
        hidden = vlm.hidden(vlm.model.get_input_embeddings()(ids), self.mask, positions, self.cache)
        return vlm.logits(hidden[:, -1]).log_softmax(-1)

    def join(self, other: Self) -> Self:
        """All sequences of both."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        layers = zip(self._layers(length), other._layers(length), strict=True)
        cache = DynamicCache([(torch.cat([k, k2]), torch.cat([v, v2])) for (k, v), (k2, v2) in layers])
        masks = [pad(rows.mask, (length - rows.mask.shape[1], 0), value=False) for rows in (self, other)]
        return type(self)(self.sequences + other.sequences, torch.cat(masks), cache)

    def keep(self, indices: list[int]) -> Self:
        """These sequences alone (at least one), without the padding that none of them needs."""
        mask = self.mask[indices]
        start = int(mask.any(0).int().argmax())
        cache = DynamicCache([(k[indices, :, start:], v[indices, :, start:]) for k, v, *_ in self.cache])
        return type(self)([self.sequences[i] for i in indices], mask[:, start:], cache)

    def _layers(self, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [B, heads, length, head size] of each layer."""
        missing = (0, 0, length - self.mask.shape[1], 0)
        return ((pad(k, missing), pad(v, missing)) for k, v, *_ in self.cache)
