"""What a record costs, and what there is to say of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hscr.config import FinetuneConfig
from hscr.learn.examples import Example
from hscr.learn.losses import nll, preference_loss, reward_values


def objective(
    logps: Tensor, reference: Tensor, examples: Sequence[Example], config: FinetuneConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [B], and the values that are averaged under TRL's names.

    logps, reference: [B, 1 + J] of the policy and of the frozen reference, anything in empty slots. A loss is
    Eq. 7 with its weights plus the weighted NLL of the preferred answer; for `sft` the NLL per token alone.
    """
    answers = torch.tensor([len(example.completions) for example in examples], device=logps.device)
    lengths = torch.tensor([len(example.completions[0]) for example in examples], device=logps.device)
    present = torch.arange(logps.shape[1], device=logps.device) < answers[:, None]
    ratios = logps - reference
    terms = preference_loss(
        ratios,
        present,
        config.gamma,
        reduction=config.pair_reduction,
        detach_winner=config.implicit_detach_winner,
    )
    likelihood = nll(logps[:, 0], lengths)
    weighted = config.explicit_weight * terms.explicit + config.implicit_weight * terms.implicit
    values = {
        **reward_values(ratios, present, config.gamma),
        "loss/explicit": terms.explicit,
        "loss/implicit": terms.implicit,
        "loss/nll": likelihood,
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1:][present[:, 1:]],
    }
    return likelihood if config.objective == "sft" else weighted + config.nll_weight * likelihood, values
