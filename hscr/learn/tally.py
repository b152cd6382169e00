"""Means over everything a step has seen, in however many parts and processes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Tally:
    """Sums and counts by name, until they are drained."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take any number of values [n] of each name."""
        for name, each in values.items():
            new = torch.stack([each.detach().double().sum(), each.new_tensor(len(each)).double()])
            self._sums[name] = self._sums.get(name, 0) + new

    def drain(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means by name, without those of no values; `reduce` adds up tensors of all processes."""
        names = sorted(self._sums)
        totals = reduce(torch.stack([self._sums[name] for name in names])).tolist() if names else []
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}
