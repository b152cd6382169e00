"""Flat passes through the language model of a LLaVA: prompts, completions behind them, further tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hscr.models.attention import Block, Branching, Continuing, Memory, Reading
from hscr.models.branches import Packed, branch_mask, pack
from hscr.models.products import fast_products

_LEAST_FILLED = 0.75
_ROOM = 32
# Longer passes fall out of a CPU's caches; a GPU wants to be busy.
_TOKENS_AT_ONCE = {"cpu": 4096}
_TOKENS_AT_ONCE_ELSEWHERE = 16384


def tokens_at_once(device: torch.device) -> int:
    """The longest pass that is worth its memory."""
    return _TOKENS_AT_ONCE.get(device.type, _TOKENS_AT_ONCE_ELSEWHERE)


class View(NamedTuple):
    """What a prompt shows of one image."""

    tokens: Tensor
    """[n, d] visual tokens"""
    at: Tensor
    """[n] long: their positions, relative to the image's first"""
    span: int
    """positions the image takes in the prompt"""

    @classmethod
    def whole(cls, tokens: Tensor) -> Self:
        """All of [N, d] tokens, one after another."""
        return cls(tokens, torch.arange(len(tokens), device=tokens.device), len(tokens))


class Prompts(NamedTuple):
    """B embedded prompts of any lengths L."""

    embeds: list[Tensor]
    """[L, d] each"""
    positions: list[Tensor]
    """[L] long each"""
    ends: list[int]
    """position of each prompt's first answer token"""

    def only(self, row: int) -> Self:
        """One of them."""
        return type(self)([self.embeds[row]], [self.positions[row]], [self.ends[row]])


class Read(NamedTuple):
    """Prompts of similar length that share one memory."""

    rows: list[int]
    """which of the batch they are"""
    memory: Memory


class Context(NamedTuple):
    """A batch of B prompts the model has read."""

    parts: list[Read]
    last: Tensor
    """[B, d]: hidden state of each prompt's last token, which predicts the first of any answer"""
    ends: list[int]
    """position of each prompt's first answer token"""

    def row(self, index: int) -> tuple[Memory, int]:
        """The memory that holds row `index`, and where in it."""
        return next((part.memory, part.rows.index(index)) for part in self.parts if index in part.rows)


class Language:
    """The text side of `LlavaForConditionalGeneration`; its attention is `hscr.models.attention`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = model.device
        self.tokens_at_once = tokens_at_once(model.device)
        """the longest pass that reads prompts or images, of which one may still be longer"""

    def embed_ids(self, ids: Tensor) -> Tensor:
        """[..., d] input embeddings of token ids [...]."""
        return self.model.get_input_embeddings()(ids.to(self.device))

    def hidden(
        self, embeds: Tensor, positions: Tensor, blocks: Sequence[Block], keep: Tensor | None = None
    ) -> Tensor:
        """[T, d]: last hidden states of one pass over embeds [T, d] at positions [T]; [M, d] of `keep` [M].

        Layers are called one by one so that the last one's feed-forward, a sixth of a small model's work,
        runs only where it is asked about. Expects pre-norm decoder layers, as of Llama, Mistral and Qwen.
        """
        body = self.model.model.language_model
        states, unused = embeds[None], embeds.new_empty(1, 1, 1, 1)
        shared = {
            "attention_mask": unused,  # what is visible stands in the blocks
            "position_embeddings": body.rotary_emb(states, position_ids=positions[None]),
            "blocks": blocks,
        }
        *layers, last = body.layers
        with fast_products(embeds):
            for layer in layers:
                states = layer(states, **shared)
            mixed, _ = last.self_attn(hidden_states=last.input_layernorm(states), **shared)
            states = (states + mixed)[0]
            states = states if keep is None else states[keep]
            return body.norm(states + last.mlp(last.post_attention_layernorm(states)))

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [..., V] of hidden states [..., d]."""
        with fast_products(hidden):
            return self.model.lm_head(hidden).float()

    def prefill(self, prompts: Prompts) -> Context:
        """Forward the prompts once, for any number of completions."""
        lengths = torch.tensor([len(row) for row in prompts.embeds], device=self.device)
        groups = _alike(lengths.tolist(), self.tokens_at_once)
        parts = [Read(rows, Memory.empty(lengths[rows])) for rows in groups]
        last = torch.cat([self._read(prompts, some) for some in _passes(parts, self.tokens_at_once)])
        order = torch.tensor([row for part in parts for row in part.rows], device=self.device)
        return Context(parts, last[order.argsort()], prompts.ends)

    def _read(self, prompts: Prompts, parts: Sequence[Read]) -> Tensor:
        """[R, d]: fill the parts' memories in one pass; last hidden states of their rows, in their order."""
        layers = len(self.model.model.language_model.layers)
        blocks, embeds, positions, keep, start = [], [], [], [], 0
        for rows, memory in parts:
            width = int(memory.lengths.max())
            blocks.append(Reading(len(rows), width, memory, layers))
            embeds.append(pad_sequence([prompts.embeds[row] for row in rows], batch_first=True).flatten(0, 1))
            positions.append(
                pad_sequence([prompts.positions[row] for row in rows], batch_first=True).flatten()
            )
            keep.append(start + torch.arange(len(rows), device=self.device) * width + memory.lengths - 1)
            start += len(rows) * width
        return self.hidden(torch.cat(embeds), torch.cat(positions), blocks, torch.cat(keep))

    def reading_states(self, prompts: Prompts) -> list[Tensor]:
        """States [L, d] after each token of each prompt: each in a pass of its own, remembering nothing."""
        rows = zip(prompts.embeds, prompts.positions, strict=True)
        return [self.hidden(embeds, at, [Reading(1, len(embeds))]) for embeds, at in rows]

    def completion_states(
        self, context: Context, completions: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Tensor]]:
        """States [T, d] before each token of each completion; completions[b] follow row b's prompt."""
        packs = [
            pack([context.ends[r] for r in part.rows], [completions[r] for r in part.rows], self.device)
            for part in context.parts
        ]
        suffixes = self._behind(context, packs)
        states = [
            torch.cat([context.last[part.rows][:, None], suffix], dim=1)[packed.rows, packed.columns]
            for part, packed, suffix in zip(context.parts, packs, suffixes, strict=True)
        ]
        rows = [row for part in context.parts for row in part.rows]
        sizes = [len(y) for row in rows for y in completions[row]]
        split = iter(torch.split(torch.cat(states), sizes))
        found = {row: [next(split) for _ in completions[row]] for row in rows}
        return [found[row] for row in range(len(completions))]

    def completion_logits(
        self, context: Context, completions: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Tensor]]:
        """fp32 logits [T, V] before each token of each completion; completions[b] follow row b's prompt."""
        states = [y for row in self.completion_states(context, completions) for y in row]
        logits = iter(torch.split(self.logits(torch.cat(states)), [len(y) for y in states]))
        return [[next(logits) for _ in row] for row in completions]

    def completion_logprobs(
        self, context: Context, completions: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Tensor]]:
        """fp32 log-prob [T] of each token of each completion, end-of-sequence included."""
        logits = self.completion_logits(context, completions)
        return [
            [gather_logprobs(z, y) for z, y in zip(*pair, strict=True)]
            for pair in zip(logits, completions, strict=True)
        ]

    def step(self, memories: Sequence[Memory], tokens: Tensor, positions: Tensor) -> Tensor:
        """[R, d]: hidden states after each row of all memories, in their order, has read one more token.

        tokens, positions: [R]. The memories grow by what was read.
        """
        columns = [int(memory.lengths.max()) + 1 for memory in memories]
        for memory, needed in zip(memories, columns, strict=True):
            if needed > memory.capacity:
                memory.reserve(needed + _ROOM)
        hidden = self.read_on(memories, tokens, positions, columns)
        for memory in memories:
            memory.lengths += 1
        return hidden

    def read_on(
        self, memories: Sequence[Memory], tokens: Tensor, positions: Tensor, columns: Sequence[int]
    ) -> Tensor:
        """The pass of a step over the first `columns` of each memory: fit for compilation."""
        blocks = [Continuing(memory, count) for memory, count in zip(memories, columns, strict=True)]
        return self.hidden(self.embed_ids(tokens), positions, blocks)

    def _behind(self, context: Context, packs: Sequence[Packed]) -> list[Tensor]:
        """Hidden states [R, S, d] of the slots behind each part's prompts."""
        blocks = []
        for (_, memory), packed in zip(context.parts, packs, strict=True):
            mask = branch_mask(memory.lengths, memory.capacity, packed.branch)
            rows, slots = packed.branch.shape
            blocks.append(Branching(rows, slots, mask, memory))
        tokens = torch.cat([packed.tokens.flatten() for packed in packs])
        if not len(tokens):
            return [context.last.new_empty(*packed.tokens.shape, context.last.shape[1]) for packed in packs]
        positions = torch.cat([packed.positions.flatten() for packed in packs])
        hidden = self.hidden(self.embed_ids(tokens), positions, blocks)
        parts = torch.split(hidden, [packed.tokens.numel() for packed in packs])
        shapes = [(*packed.tokens.shape, hidden.shape[1]) for packed in packs]
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def gather_logprobs(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """fp32 log-prob [T] of each id under logits [T, V]."""
    index = torch.tensor(ids, device=logits.device)
    return logits.float().log_softmax(-1).gather(-1, index[:, None])[:, 0]


def _alike(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in groups, longest first: no row much shorter than its group's longest, and none of a group
    that would pad to more than `tokens`, unless it is alone.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and lengths[row] >= _LEAST_FILLED * longest and (len(groups[-1]) + 1) * longest <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _passes(parts: Sequence[Read], tokens: int) -> list[list[Read]]:
    """Neighbouring parts together while they stay within `tokens`."""
    passes: list[list[Read]] = []
    used = 0
    for part in parts:
        size = len(part.rows) * int(part.memory.lengths.max())
        if passes and used + size <= tokens:
            passes[-1].append(part)
            used += size
        else:
            passes.append([part])
            used = size
    return passes
