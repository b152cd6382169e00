"""Several questions about one image in one sequence: one copy of its visual tokens, blind to one another."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hscr.models.phantom.data import Example

IGNORED = -100
_SHARED, _PADDING = 0, -1


@dataclass(frozen=True)
class Packed:
    """A batch of B sequences of L tokens.

    `input_ids`, `position_ids`, `labels` are int64 [B, L], `labels` already shifted to the position that
    predicts and `IGNORED` outside the answers; `mask` is bool [B, 1, L, L], true where a row may look at a
    column.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    mask: Tensor


def prompt_head(tokenizer: PreTrainedTokenizerBase, visual_tokens: int) -> list[int]:
    """Tokens of the chat template up to and including the image."""
    head = tokenizer.encode("USER: <image>", add_special_tokens=False)
    return [*head[:-1], *[head[-1]] * visual_tokens]


def prompt_tail(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Tokens of the chat template after the image, up to where the answer starts."""
    return tokenizer.encode(f"\n{question} ASSISTANT:", add_special_tokens=False)


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The answer as the model writes it, with the end-of-sequence token."""
    return [*tokenizer.encode(f" {answer}", add_special_tokens=False), tokenizer.eos_token_id]


def pack(
    tokenizer: PreTrainedTokenizerBase, images: Sequence[Sequence[Example]], visual_tokens: int
) -> Packed:
    """Pack each image's examples behind one copy of its visual tokens.

    Every question's positions continue from the shared head, as if it stood there alone.
    """
    head = prompt_head(tokenizer, visual_tokens)
    rows = [_row(tokenizer, head, examples) for examples in images]
    length = max(len(row) for row in rows)
    filler = (tokenizer.pad_token_id, 0, IGNORED, _PADDING)
    table = torch.tensor([row + [filler] * (length - len(row)) for row in rows])
    input_ids, position_ids, labels, segments = table.unbind(-1)
    return Packed(input_ids, position_ids, labels, _mask(segments))


def _row(
    tokenizer: PreTrainedTokenizerBase, head: list[int], examples: Sequence[Example]
) -> list[tuple[int, int, int, int]]:
    """(token, position, label, segment) of each token of one image's sequence."""
    row = [(token, position, IGNORED, _SHARED) for position, token in enumerate(head)]
    for segment, example in enumerate(examples, start=1):
        question, answer = prompt_tail(tokenizer, example.question), answer_tokens(tokenizer, example.answer)
        tokens = question + answer[:-1]
        labels = [IGNORED] * (len(question) - 1) + answer
        row += [
            (token, len(head) + offset, label, segment)
            for offset, (token, label) in enumerate(zip(tokens, labels, strict=True))
        ]
    return row


def _mask(segments: Tensor) -> Tensor:
    rows, columns = segments[:, :, None], segments[:, None, :]
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = causal & ((columns == _SHARED) | (columns == rows))
    # A padded row sees itself, because a softmax over nothing is not a number.
    return (visible | torch.eye(length, dtype=torch.bool))[:, None]
