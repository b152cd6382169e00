"""What replaces a sensitive token, and the edited answers that result (HSCR Eq. 4, second half)."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hscr.config import GenerateConfig, SubstituteConfig
from hscr.contrast.contrast import log_p_diff, plausible, quantised
from hscr.contrast.degrade import seeded
from hscr.contrast.sensitive import sensitive_positions, sensitivity
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
    """fp32 logits [T, V] with the rest of them dropped"""


class Edit(NamedTuple):
    """y_w with some tokens replaced in place."""

    ids: list[int]
    substitutions: tuple[Substitution, ...]

    @property
    def first(self) -> int:
        """The lowest substituted position."""
        return min(substitution.position for substitution in self.substitutions)


def substitutes(
    gold: int, full: Tensor, dropped: Tensor, vocabulary: Vocabulary, config: SubstituteConfig
) -> list[int]:
    """Ids that may stand for `gold`, in the order in which the candidates take them.

    full, dropped: log-probs [V] of both branches. The top_m of the dropped branch among content tokens, less
    gold, its variants of case and space, and what is implausible beside either branch's first choice (as
    in VCD, arXiv 2311.16922): a function word has no such substitute. `plausible` keeps those below gold's
    P_diff, most probable when the image is overlooked first; `pdiff_ascending` is Eq. 4 as printed. Ties
    go to the lower id.
    """
    allowed = vocabulary.content.clone()
    allowed[vocabulary.variants(gold)] = False
    allowed &= plausible(dropped, config.plausibility) & plausible(full, config.full_plausibility)
    scores = torch.where(allowed, quantised(dropped), -torch.inf)
    count = min(config.top_m, int(allowed.sum()))
    likely = torch.sort(scores, descending=True, stable=True).indices[:count].tolist()
    differences = quantised(log_p_diff(full, dropped, config.beta)).tolist()
    if config.order == "plausible":
        return [token for token in likely if differences[token] < differences[gold]]
    return sorted(likely, key=lambda token: (differences[token], token))


def random_substitutes(gold: int, vocabulary: Vocabulary, count: int, *key: object) -> list[int]:
    """`count` content tokens drawn uniformly without replacement, less gold and its variants: the control."""
    allowed = vocabulary.content.clone()
    allowed[vocabulary.variants(gold)] = False
    pool = allowed.nonzero()[:, 0]
    order = torch.randperm(len(pool), generator=seeded("substitutes", *key))[:count]
    return pool[order].tolist()


def edits(branches: Branches, vocabulary: Vocabulary, config: GenerateConfig) -> Iterator[Edit]:
    """Edited answers in the order of preference for them; none when no position can be replaced.

    The edit of rank c takes each position's c-th substitute, at all sensitive positions and then at ever
    fewer of the most sensitive: answers near to and far from y_w are what makes levels.
    """
    full, dropped = branches.full.log_softmax(-1), branches.dropped.log_softmax(-1)
    scores = sensitivity(branches.full, branches.dropped, branches.ids)
    positions = sensitive_positions(scores, vocabulary.content[branches.ids], config.sensitive)
    contrast = log_p_diff(full, dropped, config.substitute.beta)
    options = []
    for t in positions:
        gold = branches.ids[t]
        tokens = substitutes(gold, full[t], dropped[t], vocabulary, config.substitute)
        if config.substitute.negatives == "random":
            # As many as HSCR would have, at the places where it has any: nothing but the choice is random.
            tokens = random_substitutes(gold, vocabulary, len(tokens), branches.key, config.seed, t)
        options.append(tokens)
    for rank in range(max(map(len, options), default=0)):
        swaps = [
            Substitution(
                position=t,
                old_id=branches.ids[t],
                new_id=tokens[rank],
                sensitivity=round(float(scores[t]), 4),
                contrast_probability=round(float(contrast[t, tokens[rank]].exp()), 4),
            )
            for t, tokens in zip(positions, options, strict=True)
            if rank < len(tokens)
        ]
        for count in _counts(len(swaps)):
            yield apply(branches.ids, swaps[:count])


def apply(ids: list[int], substitutions: list[Substitution]) -> Edit:
    """Replace exactly the listed positions."""
    edited = list(ids)
    for substitution in substitutions:
        edited[substitution.position] = substitution.new_id
    return Edit(edited, tuple(substitutions))


def _counts(n: int) -> list[int]:
    """n, 3n/4, n/2 and n/4, rounded up, each once."""
    return list(dict.fromkeys(math.ceil(n * share / 4) for share in (4, 3, 2, 1)))
