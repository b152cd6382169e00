"""A batch of prompts, each with its image and all its answers, as one pass through the model's own forward.

The prompt and its image are forwarded once, and 1 + J answers follow it as branches that do not see one
another (arXiv 2410.20305, 2506.05433). Only the states that predict an answer's token reach the LM head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from hscr.learn.examples import Example
from hscr.models.attention import Block, Branching, Reading
from hscr.models.branches import branch_mask, pack
from hscr.models.language import gather_logprobs

_LOGITS_AT_ONCE = 2**26


def tree_inputs(examples: Sequence[Example], device: torch.device) -> dict[str, Any]:
    """Arguments of `LlavaForConditionalGeneration.forward`, images excepted, for a model of `VLM.load`.

    The pass has T = B × P + B × S tokens: B prompts padded on the right to P, then the answers of each prompt
    in S slots. Its logits are [1, M, V], one row per answer token in the order of `answer_tokens`.
    """
    prompts = [torch.tensor(example.prompt) for example in examples]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    read = pad_sequence(prompts, batch_first=True).to(device)
    count, width = read.shape
    packed = pack(lengths.tolist(), [example.completions for example in examples], device)
    slots = packed.tokens.shape[1]
    reading = Reading(count, width)
    blocks: list[Block] = [reading]
    if slots:
        mask = branch_mask(lengths, width, packed.branch)
        blocks.append(Branching(count, slots, mask, reading))
    before = packed.rows * width + lengths[packed.rows] - 1
    behind = count * width + packed.rows * slots + packed.columns - 1
    columns = torch.arange(width, device=device).repeat(count)
    return {
        "input_ids": torch.cat([read.flatten(), packed.tokens.flatten()])[None],
        "position_ids": torch.cat([columns, packed.positions.flatten()])[None],
        "attention_mask": torch.empty(1, 1, 1, 1, device=device),  # what is visible stands in the blocks
        "blocks": blocks,
        "logits_to_keep": torch.where(packed.columns == 0, before, behind),
        "use_cache": False,
    }


def answer_tokens(examples: Sequence[Example]) -> list[int]:
    """[M]: the tokens of all answers, record by record, which the logits' rows predict."""
    return [token for example in examples for answer in example.completions for token in answer]


def sequence_logps(logits: Tensor, examples: Sequence[Example], at_once: int = _LOGITS_AT_ONCE) -> Tensor:
    """[B, 1 + J] fp32: summed log-probs of each answer under logits [M, V]; 0 in slots a record leaves empty.

    `at_once` logits are normalised at a time, and again in the backward pass: no second [M, V] is kept.
    """
    tokens, rows = answer_tokens(examples), max(1, at_once // logits.shape[-1])
    pieces = torch.split(logits, rows)
    parts = [
        checkpoint(
            gather_logprobs, part, tokens[at * rows : (at + 1) * rows], use_reentrant=False,
            preserve_rng_state=False,
        )
        for at, part in enumerate(pieces)
    ]  # fmt: skip
    lengths = [len(answer) for example in examples for answer in example.completions]
    sums = torch.split(torch.cat(parts), lengths)
    totals = iter([row.sum() for row in sums])
    rowwise = [torch.stack([next(totals) for _ in example.completions]) for example in examples]
    return pad_sequence(rowwise, batch_first=True)


def mean_logits(logits: Tensor, examples: Sequence[Example], counted: Tensor) -> dict[str, Tensor]:
    """fp32 means over the vocabulary before each token of preferred answers and of others, by TRL's names.

    logits: [M, V] as for `sequence_logps`; of the examples only those that `counted` [B] names.
    """
    means = logits.detach().mean(-1, dtype=torch.float32)
    kept = [
        (counts and not number, counts and number > 0, len(answer))
        for example, counts in zip(examples, counted.tolist(), strict=True)
        for number, answer in enumerate(example.completions)
    ]
    chosen, rejected, lengths = (
        torch.tensor(column, device=means.device) for column in zip(*kept, strict=True)
    )
    return {
        "logits/chosen": means[chosen.repeat_interleave(lengths)],
        "logits/rejected": means[rejected.repeat_interleave(lengths)],
    }
