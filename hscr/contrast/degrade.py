"""Visual-token dropout after the projector (HSCR §3.1)."""

import hashlib
from typing import Literal

import torch
from torch import Tensor


def seeded(*parts: object) -> torch.Generator:
    """A CPU random generator that depends on nothing but the named parts."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def kept_tokens(count: int, rate: float, *key: object) -> Tensor:
    """Ascending indices of exactly round((1 - rate) * count) visual tokens, drawn without replacement.

    `key` names the draw: equal keys drop the same tokens on any machine and beside any batch mates.
    """
    kept = round((1 - rate) * count)
    return torch.randperm(count, generator=seeded(*key))[:kept].sort().values


def degrade(visual: Tensor, rate: float, mode: Literal["delete", "zero"], *key: object) -> Tensor:
    """Visual tokens [N, d] of which the share `rate` is deleted (fewer rows) or zeroed (N rows).

    Order is preserved; rate 0 returns the same numbers bit for bit.
    """
    kept = kept_tokens(len(visual), rate, *key).to(visual.device)
    if mode == "delete":
        return visual[kept]
    zeroed = torch.zeros_like(visual)
    zeroed[kept] = visual[kept]
    return zeroed
