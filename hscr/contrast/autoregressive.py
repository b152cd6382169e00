"""Edited answers made left to right: each substitute is chosen after those before it (HSCR Eq. 4's y_<t).

The words of y_w between the substitutes stay, so that an edit changes the listed positions only.
"""

from collections.abc import Iterable, Sequence
from itertools import count, islice

import torch

from hscr.config import GenerateConfig
from hscr.contrast.edit import Branches, Edit, Place, apply, chosen_positions, counts, place
from hscr.contrast.sensitive import is_alone
from hscr.models.language import Context
from hscr.models.vlm import VLM
from hscr.models.vocabulary import Vocabulary
from hscr.records import Substitution


class _Draft:
    """An edit of `ids` in the making: the rank-th substitute goes into each of the positions."""

    def __init__(self, key: str, ids: list[int], rank: int, positions: Sequence[int]) -> None:
        self.key, self.ids, self.rank = key, ids, rank
        self.positions = sorted(positions)
        self.swaps: list[Substitution] = []

    @property
    def edit(self) -> Edit:
        return apply(self.ids, self.swaps)

    def before(self, turn: int) -> tuple[int, ...]:
        """The tokens that both branches have seen at its next position."""
        return tuple(self.edit.ids[: self.positions[turn]])

    def take(self, spot: Place) -> None:
        swap = spot.take(self.rank)
        if swap is not None:
            self.swaps.append(swap)


def autoregressive_edits(
    vlm: VLM, context: Context, sources: Iterable[Branches], config: GenerateConfig
) -> list[list[Edit]]:
    """Edits of each source, in the order of `hscr.contrast.edit.edits`.

    context: 2B rows, every source with the whole image and then every source with what it overlooks. Which
    positions are edited is decided by the answer itself; whether one is, and by what, after the tokens that
    are then before it. One forward of all drafts per position; drafts that agree so far share it.
    """
    drafts = [_drafts(source, vlm.vocabulary, config) for source in sources]
    for turn in range(max((len(draft.positions) for row in drafts for draft in row), default=0)):
        opened = [[draft for draft in row if turn < len(draft.positions)] for row in drafts]
        for row, places in zip(opened, _places(vlm, context, opened, turn, config), strict=True):
            for draft in row:
                draft.take(places[draft.before(turn)])
    return [[draft.edit for draft in row if draft.swaps] for row in drafts]


def _drafts(source: Branches, vocabulary: Vocabulary, config: GenerateConfig) -> list[_Draft]:
    positions = chosen_positions(source, vocabulary, config)
    plans = (
        _Draft(source.key, source.ids, rank, positions[:n])
        for rank in count()
        for n in counts(len(positions), config.substitute)
    )
    return list(islice(plans, config.substitute.candidates)) if positions else []


def _places(
    vlm: VLM, context: Context, drafts: Sequence[Sequence[_Draft]], turn: int, config: GenerateConfig
) -> list[dict[tuple[int, ...], Place]]:
    """Of each source: what may stand at its drafts' next positions, by the tokens before."""
    distinct = [{draft.before(turn): draft for draft in row} for row in drafts]
    # The last token of a completion is only a target; any will do.
    asked = [[[*before, vlm.eos_id] for before in row] for row in distinct]
    states = vlm.completion_states(context, asked + asked)
    logits = vlm.logits(torch.stack([branch[-1] for row in states for branch in row]))
    full, dropped = (iter(half) for half in logits.chunk(2))
    return [
        {
            before: place(
                draft.ids[len(before)],
                (next(full), next(dropped)),
                vlm.vocabulary,
                config,
                key=draft.key,
                position=len(before),
                alone=is_alone(draft.ids, vlm.vocabulary.content, config.sensitive),
            )
            for before, draft in row.items()
        }
        for row in distinct
    ]
