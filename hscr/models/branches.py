"""Several completions after one prefix in one row, so that the prefix is forwarded once.

Each completion (branch) sees the prefix and itself, never its siblings, and its positions continue the
prefix's. The result equals forwarding every completion in a row of its own (arXiv 2410.20305, 2506.05433).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

_PREFIX, _PADDING = -1, -2


class Packed(NamedTuple):
    """S slots behind the prefixes of B rows, and the M targets of all completions in their order."""

    tokens: Tensor
    """[B, S] input ids; the last token of a completion is only a target"""
    positions: Tensor
    """[B, S]"""
    branch: Tensor
    """[B, S]: which of its row's completions a slot belongs to"""
    rows: Tensor
    """[M]: row of the slot that predicts each target"""
    columns: Tensor
    """[M]: its column; 0 is the prefix's last slot, 1 + s is slot s"""


def pack(
    lengths: Sequence[int], completions: Sequence[Sequence[Sequence[int]]], device: torch.device
) -> Packed:
    """Lay out completions[b] (token ids, T >= 1 each) behind row b's prefix of lengths[b] tokens."""
    slots = max(sum(len(y) - 1 for y in row) for row in completions)
    tokens, positions, branch, rows, columns = [], [], [], [], []
    for index, (row, length) in enumerate(zip(completions, lengths, strict=True)):
        free = slots - sum(len(y) - 1 for y in row)
        tokens.append([token for y in row for token in y[:-1]] + [0] * free)
        positions.append([length + i for y in row for i in range(len(y) - 1)] + [0] * free)
        branch.append([j for j, y in enumerate(row) for _ in y[:-1]] + [_PADDING] * free)
        at = 1
        for y in row:
            rows += [index] * len(y)
            columns += [0, *range(at, at + len(y) - 1)]
            at += len(y) - 1
    ids = partial(torch.tensor, dtype=torch.long, device=device)
    return Packed(ids(tokens), ids(positions), ids(branch), ids(rows), ids(columns))


def prefix_attention(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, P, P] added to attention scores: causal among the real tokens of mask [B, P]."""
    prefix = torch.where(mask, _PREFIX, _PADDING)
    return _attention(prefix, prefix, dtype)


def branch_attention(mask: Tensor, branch: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, S, P + S] added to attention scores of the slots `branch` [B, S] behind a prefix mask [B, P]."""
    prefix = torch.where(mask, _PREFIX, _PADDING)
    return _attention(branch, torch.cat([prefix, branch], dim=1), dtype)


def _attention(query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, else the type's lowest number; queries are the last slots of the keys.

    Padding attends to padding, so that no row is empty: softmax over nothing would be NaN.
    """
    slots = torch.arange(key.shape[1], device=key.device)
    causal = slots[-query.shape[1] :, None] >= slots
    query, key = query[:, :, None], key[:, None, :]
    allowed = causal & ((query == key) | ((key == _PREFIX) & (query != _PADDING)))
    blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
    return torch.where(allowed, torch.zeros_like(blocked), blocked)[:, None]
