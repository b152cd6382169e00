"""Which tokens of the preferred answer depend on seeing (HSCR Eq. 4, first half)."""

import math

import torch
from torch import Tensor

from hscr.config import SensitiveConfig
from hscr.contrast.contrast import quantised
from hscr.models.vlm import gather_logprobs


def sensitivity(full: Tensor, dropped: Tensor, ids: list[int]) -> Tensor:
    """[T]: |log p_full(y_t) - log p_drop(y_t)| in nats, from logits [T, V] of both branches."""
    return (gather_logprobs(full, ids) - gather_logprobs(dropped, ids)).abs()


def sensitive_positions(scores: Tensor, eligible: Tensor, config: SensitiveConfig) -> list[int]:
    """Eligible positions, most sensitive first, ties to the lowest; scores [T] in nats, eligible [T] bool.

    At most n and, unless `literal_n`, at most half of the eligible ones: replacing nearly every word of a
    short answer would make no probable negative.
    """
    count = int(eligible.sum())
    limit = count if config.literal_n else math.ceil(count / 2)
    ranked = torch.sort(quantised(scores), descending=True, stable=True).indices.tolist()
    return [position for position in ranked if eligible[position]][: min(config.n, limit)]
