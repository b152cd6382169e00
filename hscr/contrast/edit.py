"""Edited answers: sensitive tokens of y_w replaced in place, each beside y_w's own words (teacher-forced)."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from hscr.config import GenerateConfig, SubstituteConfig
from hscr.contrast.contrast import log_p_diff
from hscr.contrast.sensitive import eligible_positions, is_alone, sensitive_positions, sensitivity
from hscr.contrast.substitute import random_substitutes, substitutes
from hscr.models.vocabulary import Vocabulary
from hscr.records import Substitution


class Branches(NamedTuple):
    """The preferred answer y_w of one source, teacher-forced under both branches."""

    key: str
    """id of the source: names its random draws"""
    ids: list[int]
    """T token ids, end-of-sequence last"""
    full: Tensor
    """fp32 logits [T, V] with all visual tokens"""
    dropped: Tensor
    """fp32 logits [T, V] of the branch that overlooks"""


class Edit(NamedTuple):
    """y_w with some tokens replaced in place."""

    ids: list[int]
    substitutions: tuple[Substitution, ...]

    @property
    def first(self) -> int:
        """The lowest substituted position; 0 without any."""
        return min((substitution.position for substitution in self.substitutions), default=0)


class Place(NamedTuple):
    """A position, and what may stand there after one sequence of tokens."""

    position: int
    old_id: int
    sensitivity: float
    new_ids: list[int]
    """in the order in which the candidates take them"""
    probabilities: list[float]
    """P_diff of each"""

    def take(self, rank: int) -> Substitution | None:
        """What the candidate of this rank says here."""
        if rank >= len(self.new_ids):
            return None
        return Substitution(
            position=self.position,
            old_id=self.old_id,
            new_id=self.new_ids[rank],
            sensitivity=round(self.sensitivity, 4),
            contrast_probability=round(self.probabilities[rank], 4),
        )


def place(
    gold: int,
    logits: tuple[Tensor, Tensor],
    vocabulary: Vocabulary,
    config: GenerateConfig,
    *,
    key: str,
    position: int,
    alone: bool,
) -> Place:
    """What may replace `gold`, from logits [V] of the full and the dropped branch before it.

    key: id of the source; with the seed and the position it names the random draws. alone: whether the
    answer has no other word to replace.
    """
    z_full, z_drop = (z.cpu() for z in logits)
    logprobs = z_full.log_softmax(-1), z_drop.log_softmax(-1)
    draw = (key, config.seed, position)
    tokens = substitutes(gold, *logprobs, vocabulary, config.substitute, *draw, alone=alone)
    if config.substitute.negatives == "random":
        # As many as HSCR would have, at the places where it has any: nothing but the choice is random.
        tokens = random_substitutes(gold, vocabulary, len(tokens), *draw)
    score = sensitivity(z_full[None], z_drop[None], [gold], config.sensitive)
    contrast = log_p_diff(*logprobs, config.substitute.beta)
    return Place(position, gold, float(score), tokens, contrast[tokens].exp().tolist())


def edits(branches: Branches, vocabulary: Vocabulary, config: GenerateConfig) -> Iterator[Edit]:
    """Edited answers in the order of preference for them; none when no position can be replaced.

    The edit of rank c takes each position's c-th substitute, at all sensitive positions and then at ever
    fewer of the most sensitive: answers near to and far from y_w are what makes levels.
    """
    key, ids, full, dropped = branches
    alone = is_alone(ids, vocabulary.content, config.sensitive)
    places = [
        place(ids[t], (full[t], dropped[t]), vocabulary, config, key=key, position=t, alone=alone)
        for t in chosen_positions(branches, vocabulary, config)
    ]
    for rank in range(max((len(spot.new_ids) for spot in places), default=0)):
        swaps = [swap for spot in places if (swap := spot.take(rank)) is not None]
        for count in counts(len(swaps), config.substitute):
            yield apply(ids, swaps[:count])


def chosen_positions(branches: Branches, vocabulary: Vocabulary, config: GenerateConfig) -> list[int]:
    """Positions to replace, most sensitive first."""
    scores = sensitivity(branches.full, branches.dropped, branches.ids, config.sensitive).cpu()
    eligible = eligible_positions(branches.ids, vocabulary.content, config.sensitive)
    return sensitive_positions(scores, eligible, config.sensitive)


def apply(ids: Sequence[int], substitutions: Sequence[Substitution]) -> Edit:
    """Replace exactly the listed positions."""
    edited = list(ids)
    for substitution in substitutions:
        edited[substitution.position] = substitution.new_id
    return Edit(edited, tuple(substitutions))


def counts(n: int, config: SubstituteConfig) -> list[int]:
    """How many of n tokens candidates replace: n, 3n/4, n/2 and n/4, rounded up, each once."""
    shares = (4, 3, 2, 1) if config.vary_count else (4,)
    return list(dict.fromkeys(math.ceil(n * share / 4) for share in shares))
