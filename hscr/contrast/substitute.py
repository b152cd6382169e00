"""What may replace a token, and in which order candidates take it (HSCR Eq. 4, second half)."""

import torch
from torch import Tensor

from hscr.config import SubstituteConfig
from hscr.contrast.contrast import log_p_diff, plausible, quantised
from hscr.contrast.degrade import seeded
from hscr.models.vocabulary import Vocabulary


def substitutes(
    gold: int,
    full: Tensor,
    dropped: Tensor,
    vocabulary: Vocabulary,
    config: SubstituteConfig,
    *key: object,
    alone: bool = False,
) -> list[int]:
    """Ids that may stand for `gold`, in the order in which the candidates take them.

    full, dropped: log-probs [V] of both branches. Allowed are content tokens, less gold, its variants of case
    and space, and what is implausible beside either branch's first choice (as in VCD, arXiv 2311.16922): a
    function word has no such substitute. C_t is the top_m of the source among them. `plausible` keeps those
    below gold's P_diff, most probable when the image is overlooked first; `pdiff_ascending` is Eq. 4 as
    printed; ties go to the lower id. `weighted` draws C_t without replacement in proportion to 1 / P_diff,
    `sample_pdiff` one token per candidate from P_diff over all allowed; `key` names the draw.

    A word that is `alone` in its answer, as yes or no, has the best alternative there is: what the model
    would rather say, or finds implausible beside the word itself, counts as well.
    """
    allowed = _others(gold, vocabulary)
    if not alone:
        allowed &= plausible(dropped, config.plausibility) & plausible(full, config.full_plausibility)
    difference = log_p_diff(full, dropped, config.beta)
    if config.order == "sample_pdiff":
        return _drawn(difference, allowed, config.candidates, *key)
    branches = {"drop": [dropped], "full": [full], "union": [dropped, full]}[config.source]
    found = {token for branch in branches for token in _top(branch, allowed, config.top_m)}
    tokens = torch.tensor(sorted(found), dtype=torch.long)
    if config.order == "plausible":
        fits = tokens if alone else tokens[quantised(difference[tokens]) < quantised(difference[gold])]
        return _sorted(fits, -quantised(dropped[fits]))
    if config.order == "pdiff_ascending":
        return _sorted(tokens, quantised(difference[tokens]))
    # Exponential clocks of rate 1 / P_diff ring in this order (Efraimidis and Spirakis 2006).
    clocks = torch.empty(len(full)).exponential_(generator=seeded("substitutes", *key))
    return _sorted(tokens, clocks[tokens].log() + difference[tokens])


def random_substitutes(gold: int, vocabulary: Vocabulary, count: int, *key: object) -> list[int]:
    """`count` content tokens drawn uniformly without replacement, less gold and its variants: the control."""
    pool = _others(gold, vocabulary).nonzero()[:, 0]
    order = torch.randperm(len(pool), generator=seeded("substitutes", *key))[:count]
    return pool[order].tolist()


def _others(gold: int, vocabulary: Vocabulary) -> Tensor:
    """[V] bool: content tokens that say something else."""
    allowed = vocabulary.content.clone()
    allowed[vocabulary.variants(gold)] = False
    return allowed


def _top(logprobs: Tensor, allowed: Tensor, count: int) -> list[int]:
    """The `count` most probable of the allowed, ties to the lower id."""
    scores = torch.where(allowed, quantised(logprobs), -torch.inf)
    least = scores.topk(min(count, len(scores))).values[-1]
    tokens = ((scores >= least) & allowed).nonzero()[:, 0]
    return _sorted(tokens, -scores[tokens])[:count]


def _sorted(tokens: Tensor, keys: Tensor) -> list[int]:
    """Ascending tokens by ascending keys; equal keys leave them ascending."""
    return tokens[keys.sort(stable=True).indices].tolist()


def _drawn(logprobs: Tensor, allowed: Tensor, count: int, *key: object) -> list[int]:
    """`count` independent draws from the probabilities of the allowed, by inversion."""
    summed = torch.where(allowed, logprobs.double().exp(), 0.0).cumsum(0)
    if summed[-1] == 0:
        return []
    uniform = torch.rand(count, generator=seeded("substitutes", *key), dtype=torch.float64)
    return torch.searchsorted(summed, uniform * summed[-1], right=True).tolist()
