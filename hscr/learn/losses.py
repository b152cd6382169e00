"""The multi-level preference loss of HSCR (Eqs. 2, 5, 6, 7) on sequence log-ratios.

r(y) = Σ_t [log π(y_t) - log ρ(y_t)] with policy π and frozen reference ρ. Column 0 of `ratios` [B, 1 + J]
is the preferred answer, columns 1..J the dispreferred ones by descending similarity; `present` [B, 1 + J]
is False in slots that a record leaves empty. Padding is taken out by selection, so it may hold anything.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class PreferenceLoss(NamedTuple):
    """Of each record, [B]; their weighted sum is Eq. 7 before the mean over the batch."""

    explicit: Tensor
    """L_E: preferred against each dispreferred (Eq. 5); with one pair this is DPO (Eq. 2)"""
    implicit: Tensor
    """L_I: each dispreferred against each less similar one (Eq. 6); 0 with fewer than two"""


def preference_loss(
    ratios: Tensor,
    present: Tensor,
    gamma: float,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    detach_winner: bool = False,
) -> PreferenceLoss:
    """-log σ(γ(r_i - r_m)) over all i < m that are present: RankNet over the ordered list.

    γ plays DPO's β. At π = ρ each pair costs ln 2, and the gradient of Eq. 7 pushes the closest
    dispreferred answer up at first: that is what the implicit term implies, unless `detach_winner` takes the
    more similar answer of its pairs for a constant. `mean` divides by the record's number of pairs.
    """
    ratios = torch.where(present, ratios.float(), 0.0)
    winners = ratios[:, :, None]
    if detach_winner:
        winners = torch.cat([winners[:, :1], winners[:, 1:].detach()], dim=1)
    ordered = torch.ones(ratios.shape[1], ratios.shape[1], dtype=torch.bool, device=ratios.device).triu(1)
    counted = ordered & present[:, :, None] & present[:, None, :]
    pairs = torch.where(counted, softplus(-gamma * (winners - ratios[:, None, :])), 0.0)
    if reduction == "mean":
        pairs = pairs / counted.sum((1, 2), keepdim=True).clamp(min=1)
    return PreferenceLoss(explicit=pairs[:, 0].sum(-1), implicit=pairs[:, 1:].sum((1, 2)))


def nll(logps: Tensor, lengths: Tensor) -> Tensor:
    """[B] nats per token: -log π(y_w) / T from sequence log-probs [B] and token counts [B]."""
    return -logps / lengths


def reward_values(ratios: Tensor, present: Tensor, gamma: float) -> dict[str, Tensor]:
    """What TRL averages under these names: rewards are γr; a pair is accurate when its margin is positive.

    One value per record for `rewards/chosen`, else one per dispreferred answer. The mean of
    `logratio/chosen`, r(y_w) itself, is negative where the preferred answers became less probable.
    """
    rewards, rejected = gamma * ratios.detach(), present[:, 1:]
    margins = (rewards[:, :1] - rewards[:, 1:])[rejected]
    return {
        "rewards/chosen": rewards[:, 0],
        "logratio/chosen": ratios[:, 0].detach(),
        "rewards/rejected": rewards[:, 1:][rejected],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
    }
