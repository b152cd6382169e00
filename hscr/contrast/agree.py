"""Making the words after an edit agree with it.

Substitutes are proposed in place, beside the preferred answer's own words: "No, there is a stone" for "Yes,
there is a stone". Eq. 4 draws each token given those before it, so a token the edited prefix makes
implausible gives way to the model's first choice there: "No, there is no stone".
"""

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from hscr.contrast.contrast import quantised
from hscr.contrast.edit import Edit
from hscr.models.language import Context
from hscr.models.vlm import VLM
from hscr.records import Change


class Agreed(NamedTuple):
    """A candidate answer that a reader, and the model, can follow."""

    ids: list[int]
    """end-of-sequence last"""
    edit: Edit
    """the substitutions it began with"""
    mean_probability: float
    """exp(mean token log p) with the whole image, in [0, 1]"""

    @property
    def changes(self) -> tuple[Change, ...]:
        """What agreement changed of the edit."""
        pairs = enumerate(zip_longest(self.edit.ids, self.ids))
        return tuple(Change(position=t, old_id=old, new_id=new) for t, (old, new) in pairs if old != new)


class _Reading(NamedTuple):
    """What the model makes of a candidate's T tokens."""

    said: Tensor
    """[T] log-prob of each"""
    best: Tensor
    """[T] log-prob of the first choice there"""
    choice: Tensor
    """[T] id of the first choice"""

    def first_implausible(self, first: int, share: float) -> int | None:
        """The lowest position after `first` whose token falls short of `share` times the best probability."""
        if share == 0:
            return None
        weak = quantised(self.said) < quantised(self.best + math.log(share))
        found = weak[first + 1 :].nonzero()[:, 0].tolist()
        return first + 1 + found[0] if found else None

    def mean_probability(self) -> float:
        # Rounded, as `quantised` explains.
        return round(float(self.said.mean().exp()), 4)


def agree(
    vlm: VLM, seen: Context, proposals: Sequence[Sequence[Edit]], *, plausibility: float, rounds: int
) -> list[list[Agreed]]:
    """Candidates of each row whose tokens, after the first substituted one, are all plausible.

    proposals[b] edit the answer of row b of `seen`. A token is plausible that reaches `plausibility` times
    the probability of the model's first choice. Each round replaces a candidate's first implausible token;
    what is still implausible after the last is dropped. `plausibility` 0 accepts every edit as it is.
    """
    settled: list[list[Agreed | None]] = [[None for _ in row] for row in proposals]
    open_ids = {(b, i): edit.ids for b, row in enumerate(proposals) for i, edit in enumerate(row)}
    for last in [False] * rounds + [True]:
        if not open_ids:
            break
        rows = [[ids for (at, _), ids in open_ids.items() if at == b] for b in range(len(proposals))]
        for ((b, i), ids), reading in zip(list(open_ids.items()), _readings(vlm, seen, rows), strict=True):
            edit = proposals[b][i]
            weak = reading.first_implausible(edit.first, plausibility)
            if weak is None:
                settled[b][i] = Agreed(ids, edit, reading.mean_probability())
            if weak is None or last:
                del open_ids[b, i]
            else:
                open_ids[b, i] = _replaced(ids, weak, int(reading.choice[weak]), vlm.eos_id)
    return [[candidate for candidate in row if candidate is not None] for row in settled]


def _readings(vlm: VLM, seen: Context, rows: Sequence[Sequence[list[int]]]) -> Iterator[_Reading]:
    """Of every answer, row by row: logits of one row's answers are all that exists at a time."""
    for answers, states in zip(rows, vlm.completion_states(seen, rows), strict=True):
        if answers:
            logprobs = vlm.logits(torch.cat(states)).log_softmax(-1)
            ids = torch.tensor([token for answer in answers for token in answer], device=logprobs.device)
            said = logprobs.gather(-1, ids[:, None])[:, 0]
            parts = [torch.split(x.cpu(), [len(y) for y in answers]) for x in (said, *logprobs.max(-1))]
            yield from (_Reading(*reading) for reading in zip(*parts, strict=True))


def _replaced(ids: list[int], position: int, token: int, eos_id: int) -> list[int]:
    """`ids` with another token at `position`, cut or extended so that it ends with end-of-sequence."""
    if token == eos_id:
        return [*ids[:position], eos_id]
    rest = ids[position + 1 :] or [eos_id]
    return [*ids[:position], token, *rest]
