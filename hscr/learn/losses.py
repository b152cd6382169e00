"""The multi-level preference loss of HSCR (Eqs. 2, 5, 6, 7) on sequence log-ratios.

r(y) = Σ_t [log π(y_t) - log ρ(y_t)] with policy π and frozen reference ρ. Column 0 of `ratios` [B, 1 + J]
is the preferred answer, columns 1..J the dispreferred ones by descending similarity; `present` [B, 1 + J]
is False in slots that a record leaves empty. Padding is taken out by selection, so it may hold anything.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class PreferenceLoss(NamedTuple):
    """Sums over a record's pairs, [B] each; their sum is Eq. 7 before the mean over the batch."""

    explicit: Tensor
    """L_E: preferred against each dispreferred (Eq. 5)"""
    implicit: Tensor
    """L_I: each dispreferred against each less similar one (Eq. 6); 0 with fewer than two"""


def preference_loss(ratios: Tensor, present: Tensor, gamma: float) -> PreferenceLoss:
    """-log σ(γ(r_i - r_m)) over all i < m that are present: RankNet over the ordered list.

    γ plays DPO's β. At π = ρ each pair costs ln 2, and the gradient of Eq. 7 pushes the closest
    dispreferred answer up at first: that is what the implicit term implies.
    """
    ratios = torch.where(present, ratios, 0.0)
    pairs = softplus(-gamma * (ratios[:, :, None] - ratios[:, None, :]))
    ordered = torch.ones_like(pairs, dtype=torch.bool).triu(1)
    pairs = torch.where(ordered & present[:, :, None] & present[:, None, :], pairs, 0.0)
    return PreferenceLoss(explicit=pairs[:, 0].sum(-1), implicit=pairs[:, 1:].sum((-1, -2)))


def nll(logps: Tensor, lengths: Tensor) -> Tensor:
    """[B] nats per token: -log π(y_w) / T from sequence log-probs [B] and token counts [B]."""
    return -logps / lengths


def reward_metrics(ratios: Tensor, present: Tensor, gamma: float) -> dict[str, float]:
    """TRL's figures of one batch: rewards are γr; accuracy counts pairs whose margin is strictly positive.

    `logratio/chosen` is the mean r(y_w) itself: below 0 the preferred answers became less probable.
    """
    rewards, rejected = gamma * ratios.detach(), present[:, 1:]
    found = {
        "rewards/chosen": float(rewards[:, 0].mean()),
        "logratio/chosen": float(ratios[:, 0].detach().mean()),
    }
    if rejected.any():
        margins = (rewards[:, :1] - rewards[:, 1:])[rejected]
        found["rewards/rejected"] = float(rewards[:, 1:][rejected].mean())
        found["rewards/margins"] = float(margins.mean())
        found["rewards/accuracies"] = float((margins > 0).float().mean())
    return found
