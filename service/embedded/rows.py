"""Sequences that decode together: one memory of keys and values."""

from functools import reduce
from typing import Self

import torch
from torch import Tensor

from hscr.models.attention import Memory
from hscr.models.language import Prompts
from hscr.models.vlm import VLM
from service.embedded.sequences import Sequence, Token


class Rows:
    """B sequences of one adapter; each is a row of the memory."""

    def __init__(self, sequences: list[Sequence], memory: Memory) -> None:
        self.sequences = sequences
        self._memory = memory

    @classmethod
    def prefill(cls, vlm: VLM, sequences: list[Sequence], visual: list[Tensor | None]) -> tuple[Self, Tensor]:
        """Read the prompts. Returns the rows and fp32 log-probabilities [B, V] of their first tokens."""
        prompts = vlm.embed([sequence.prompt.ids for sequence in sequences], visual)
        for row, sequence in enumerate(sequences):
            if sequence.prompt_logprobs is not None:
                sequence.read = _read(vlm, sequence, prompts.only(row))
        context = vlm.prefill(prompts)
        memory = reduce(Memory.joined, (part.memory for part in context.parts))
        order = [row for part in context.parts for row in part.rows]
        rows = cls([sequences[row] for row in order], memory)
        return rows, vlm.logits(context.last[order]).log_softmax(-1)

    def step(self, vlm: VLM) -> Tensor:
        """Read each sequence's last token. Returns fp32 log-probabilities [B, V] of the next ones."""
        ids = torch.tensor([sequence.last_id for sequence in self.sequences], device=vlm.device)
        # Images are shown whole, so a token's position is the number of those before it.
        return vlm.logits(vlm.step([self._memory], ids, self._memory.lengths.clone())).log_softmax(-1)

    def join(self, other: Self) -> Self:
        """All sequences of both."""
        return type(self)(self.sequences + other.sequences, self._memory.joined(other._memory))

    def keep(self, indices: list[int]) -> Self:
        """These sequences alone (at least one)."""
        return type(self)([self.sequences[i] for i in indices], self._memory.take(indices))


def _read(vlm: VLM, sequence: Sequence, prompt: Prompts) -> list[Token]:
    """What the model thought of each token of the prompt but the first, which has nothing before it."""
    assert sequence.prompt_logprobs is not None
    ids = vlm.expanded(sequence.prompt.ids)
    (states,) = vlm.reading_states(prompt)
    logprobs = vlm.logits(states[:-1]).log_softmax(-1)
    return [
        Token.of(token, row, sequence.prompt_logprobs) for token, row in zip(ids[1:], logprobs, strict=True)
    ]
