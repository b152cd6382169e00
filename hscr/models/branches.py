"""Several completions after one prompt in one row, so that the prompt is forwarded once.

Each completion (branch) sees the prompt and itself, never its siblings, and its positions continue the
prompt's. The result equals forwarding every completion in a row of its own (arXiv 2410.20305, 2506.05433).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

_PADDING = -1


class Packed(NamedTuple):
    """S slots behind the prompts of R rows, and the M targets of all completions in their order."""

    tokens: Tensor
    """[R, S] input ids; the last token of a completion is only a target"""
    positions: Tensor
    """[R, S]"""
    branch: Tensor
    """[R, S]: which of its row's completions a slot belongs to; -1 on padding"""
    rows: Tensor
    """[M]: row of the slot that predicts each target"""
    columns: Tensor
    """[M]: its column; 0 is the prompt's last token, 1 + s is slot s"""


def pack(ends: Sequence[int], completions: Sequence[Sequence[Sequence[int]]], device: torch.device) -> Packed:
    """Lay out completions[r] (token ids, T >= 1 each), whose first tokens stand at position ends[r]."""
    slots = max(sum(len(y) - 1 for y in row) for row in completions)
    tokens, positions, branch, rows, columns = [], [], [], [], []
    for index, (row, end) in enumerate(zip(completions, ends, strict=True)):
        free = slots - sum(len(y) - 1 for y in row)
        tokens.append([token for y in row for token in y[:-1]] + [0] * free)
        positions.append([end + i for y in row for i in range(len(y) - 1)] + [0] * free)
        branch.append([j for j, y in enumerate(row) for _ in y[:-1]] + [_PADDING] * free)
        at = 1
        for y in row:
            rows += [index] * len(y)
            columns += [0, *range(at, at + len(y) - 1)]
            at += len(y) - 1
    ids = partial(torch.tensor, dtype=torch.long, device=device)
    return Packed(ids(tokens), ids(positions), ids(branch), ids(rows), ids(columns))


def branch_mask(lengths: Tensor, columns: int, branch: Tensor) -> Tensor:
    """[R, 1, S, columns + S] bool: what slots `branch` [R, S] see behind prompts of `lengths` [R] <= columns.

    Padding slots see the prompt as well, so that no row of the softmax is empty.
    """
    prompt = torch.arange(columns, device=branch.device) < lengths[:, None]
    slots = torch.arange(branch.shape[1], device=branch.device)
    siblings = (branch[:, :, None] == branch[:, None, :]) & (slots[:, None] >= slots)
    return torch.cat([prompt[:, None].expand(-1, len(slots), -1), siblings], dim=2)[:, None]
