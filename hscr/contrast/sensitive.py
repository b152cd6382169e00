"""Which tokens of the preferred answer depend on seeing (HSCR Eq. 4, first half)."""

import math

import torch
from torch import Tensor

from hscr.config import SensitiveConfig
from hscr.contrast.contrast import quantised
from hscr.models.language import gather_logprobs


def sensitivity(full: Tensor, dropped: Tensor, ids: list[int], config: SensitiveConfig) -> Tensor:
    """[T], at least 0: how far the branches' logits [T, V] are apart, as `config.score` measures it.

    `gold_logprob_abs` is |log p_full(y_t) - log p_drop(y_t)| in nats; `gold_abs` the same of logits, which
    constants on a row change; `max_abs` the largest over the vocabulary; `js` is `jensen_shannon`.
    """
    if config.score == "gold_logprob_abs":
        return (gather_logprobs(full, ids) - gather_logprobs(dropped, ids)).abs()
    if config.score == "js":
        return jensen_shannon(full.log_softmax(-1), dropped.log_softmax(-1))
    difference = (full - dropped).abs()
    if config.score == "max_abs":
        return difference.amax(-1)
    return difference.gather(-1, torch.tensor(ids, device=difference.device)[:, None])[:, 0]


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """[...]: Jensen-Shannon divergence (Lin 1991) of log-probs [..., V], in nats, between 0 and ln 2."""
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2).clamp(min=0)


def eligible_positions(ids: list[int], content: Tensor, config: SensitiveConfig) -> Tensor:
    """[T] bool: what may be replaced in an answer whose last token is end-of-sequence.

    content: [V] bool, tokens that hold a letter or digit. Answers hold no other special tokens.
    """
    eligible = content[ids] if config.content_only else torch.ones(len(ids), dtype=torch.bool)
    eligible[-1] = False
    return eligible


def is_alone(ids: list[int], content: Tensor, config: SensitiveConfig) -> bool:
    """Whether an answer has a single position that may be replaced."""
    return int(eligible_positions(ids, content, config).sum()) == 1


def sensitive_positions(scores: Tensor, eligible: Tensor, config: SensitiveConfig) -> list[int]:
    """Eligible positions, most sensitive first, ties to the lowest; scores [T], eligible [T] bool.

    At most n and, unless `literal_n`, at most half of the eligible ones: replacing nearly every word of a
    short answer would make no probable negative.
    """
    count = int(eligible.sum())
    limit = count if config.literal_n else math.ceil(count / 2)
    ranked = torch.sort(quantised(scores), descending=True, stable=True).indices.tolist()
    return [position for position in ranked if eligible[position]][: min(config.n, limit)]
