"""Making the words after an edit agree with it.

Substitutes are proposed in place, beside the preferred answer's own words: "No, there is a stone" for "Yes,
there is a stone". Eq. 4 draws each token given those before it, so a token the edited prefix makes
implausible gives way to the model's first choice there: "No, there is no stone".
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hscr.contrast.contrast import plausible
from hscr.contrast.substitute import Edit
from hscr.models.vlm import VLM, Context


class Agreed(NamedTuple):
    """A candidate answer that a reader, and the model, can follow."""

    ids: list[int]
    """end-of-sequence last"""
    edit: Edit
    """the substitutions it began with"""
    mean_probability: float
    """exp(mean token log p) with the whole image, in [0, 1]"""


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
        logits = [z for row in vlm.completion_logits(seen, rows) for z in row]
        for ((b, i), ids), z in zip(list(open_ids.items()), logits, strict=True):
            edit = proposals[b][i]
            logprobs = z.log_softmax(-1).cpu()
            weak = _first_implausible(logprobs, ids, edit.first, plausibility)
            if weak is None:
                settled[b][i] = Agreed(ids, edit, _mean_probability(logprobs, ids))
            if weak is None or last:
                del open_ids[b, i]
            else:
                open_ids[b, i] = _replaced(ids, weak, int(logprobs[weak].argmax()), vlm.eos_id)
    return [[candidate for candidate in row if candidate is not None] for row in settled]


def _first_implausible(logprobs: Tensor, ids: list[int], first: int, share: float) -> int | None:
    good = plausible(logprobs, share).gather(-1, torch.tensor(ids)[:, None])[:, 0]
    found = (~good[first + 1 :]).nonzero()[:, 0].tolist()
    return first + 1 + found[0] if found else None


def _replaced(ids: list[int], position: int, token: int, eos_id: int) -> list[int]:
    """`ids` with another token at `position`, cut or extended so that it ends with end-of-sequence."""
    if token == eos_id:
        return [*ids[:position], eos_id]
    rest = ids[position + 1 :] or [eos_id]
    return [*ids[:position], token, *rest]


def _mean_probability(logprobs: Tensor, ids: list[int]) -> float:
    # Rounded, as `quantised` explains.
    return round(float(logprobs.gather(-1, torch.tensor(ids)[:, None]).mean().exp()), 4)
