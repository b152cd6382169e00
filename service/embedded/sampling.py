"""One row's choice of its next token, independent of whatever else is in the batch."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_GREEDY_BELOW = 1e-5
"""As in vLLM: dividing by less than this overflows, and the answer is the greedy one anyway."""


@dataclass
class Sampler:
    """Temperature and nucleus sampling (Holtzman et al. 2020) with a generator of its own."""

    temperature: float
    top_p: float
    generator: torch.Generator

    @classmethod
    def seeded(cls, temperature: float, top_p: float, seed: int | None) -> Self:
        """Without a seed, one is drawn from the operating system."""
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return cls(temperature, top_p, generator)

    def pick(self, logprobs: Tensor) -> int:
        """A token id from log-probabilities [V]; of equal ones the lowest id."""
        if self.temperature < _GREEDY_BELOW:
            return int(logprobs.argmax())
        weights = torch.softmax(logprobs.double() / self.temperature, dim=-1)
        if self.top_p < 1.0:
            weights = _nucleus(weights, self.top_p)
        # Inverting the distribution in id order keeps a draw stable when two weights nearly tie.
        cumulative = weights.cumsum(-1)
        drawn = torch.rand(1, generator=self.generator, dtype=torch.float64) * cumulative[-1]
        return int(torch.searchsorted(cumulative, drawn, right=True).clamp(max=int(weights.nonzero()[-1])))


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most probable tokens that together reach `top_p`; at least one."""
    ranked, order = weights.sort(descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    return torch.zeros_like(weights).scatter(0, order[before < top_p], ranked[before < top_p])


def best(logprobs: Tensor, count: int) -> list[tuple[int, float]]:
    """The `count` most probable (id, log-probability) of [V], best first, equal ones by id."""
    ranked, order = logprobs.sort(descending=True, stable=True)
    return list(zip(order[:count].tolist(), ranked[:count].tolist(), strict=True))
