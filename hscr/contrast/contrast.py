"""The contrast of the two branches (HSCR Eq. 3), and how its numbers are compared."""

import math

import torch
from torch import Tensor

_STEP = 1e-3


def log_p_diff(full: Tensor, dropped: Tensor, beta: float) -> Tensor:
    """log P_diff [T, V], P_diff = softmax[(1 + β) z_full - β z_drop] of fp32 logits [T, V] (Eq. 3)."""
    return ((1 + beta) * full - beta * dropped).log_softmax(-1)


def quantised(values: Tensor) -> Tensor:
    """Values in whole steps of 1e-3.

    Log-probs differ by up to 1e-4 between batch shapes; ranks are taken on these, so that equal records get
    equal candidates whoever shared their batch.
    """
    return (values / _STEP).round()


def first_best(scores: Tensor) -> Tensor:
    """[R] lowest id of the best of scores [R, V] in nats; within half a step of the best counts as equal."""
    equal = scores >= scores.amax(-1, keepdim=True) - _STEP / 2
    return equal.max(-1).indices  # of equal values, `max` gives the first


def plausible(logprobs: Tensor, share: float) -> Tensor:
    """[..., V] bool: tokens that reach `share` times the first choice's probability; all of them for 0."""
    if share == 0:
        return torch.ones_like(logprobs, dtype=torch.bool)
    return quantised(logprobs) >= quantised(logprobs.amax(-1, keepdim=True) + math.log(share))
