"""Attention of rows that lie one after another in one flat pass of T tokens.

A pass is a list of blocks; each block is R rows of W tokens and knows what its queries may see. Linear layers
work on all T tokens at once, whatever the rows' lengths. The function is registered with
transformers under `NAME`; a pass without blocks is answered by its own scaled dot-product attention.
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "hscr_rows"

# Not cuDNN's, which gives other bits each time that it attends to masked keys.
_REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Memory:
    """Keys and values of R rows: row r's first `lengths[r]` columns hold what it has read."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], lengths: Tensor) -> None:
        self.layers = layers
        """keys and values [R, heads, capacity, head size] of each layer"""
        self.lengths = lengths
        """[R] long"""

    @classmethod
    def empty(cls, lengths: Tensor) -> Self:
        """To be filled by one pass of `Reading` blocks."""
        return cls([], lengths)

    @classmethod
    def blank(cls, like: Self, rows: int, capacity: int) -> Self:
        """Rows that have read nothing, for a model that wrote `like`."""

        def zeros(x: Tensor) -> Tensor:
            return x.new_zeros(rows, x.shape[1], capacity, x.shape[3])

        layers = [(zeros(k), zeros(v)) for k, v in like.layers]
        return cls(layers, like.lengths.new_zeros(rows))

    @property
    def capacity(self) -> int:
        return self.layers[0][0].shape[2]

    def copy(self) -> Self:
        """The same with lengths of its own; keys and values are shared until one of both grows."""
        return type(self)(list(self.layers), self.lengths.clone())

    def reserve(self, capacity: int) -> None:
        """Make room for that many columns."""
        more = capacity - self.capacity
        if more > 0:
            self.layers = [(pad(k, (0, 0, 0, more)), pad(v, (0, 0, 0, more))) for k, v in self.layers]

    def stay(self) -> None:
        """Promise torch.compile that these tensors keep their place: CUDA graphs write only to such ones."""
        for tensor in (*(x for layer in self.layers for x in layer), self.lengths):
            torch._dynamo.mark_static_address(tensor)

    def first(self, rows: int) -> Self:
        """A view of the first rows: what it reads, these have read."""
        return type(self)([(k[:rows], v[:rows]) for k, v in self.layers], self.lengths[:rows])

    def take(self, rows: Sequence[int]) -> Self:
        """A copy of these rows, without the columns that none of them uses."""
        lengths = self.lengths[rows]
        used = int(lengths.max())
        return type(self)([(k[rows, :, :used], v[rows, :, :used]) for k, v in self.layers], lengths)

    def put(self, rows: Sequence[int], other: Self, taken: Sequence[int]) -> None:
        """Overwrite `rows` by the rows `taken` of `other`."""
        width = other.capacity
        self.reserve(width)
        into, out_of = _slice(rows), _slice(taken)
        for (k, v), (k2, v2) in zip(self.layers, other.layers, strict=True):
            k[into, :, :width], v[into, :, :width] = k2[out_of], v2[out_of]
        self.lengths[rows] = other.lengths[taken]

    def joined(self, other: Self) -> Self:
        """The rows of both."""
        capacity = max(self.capacity, other.capacity)
        one, two = self.copy(), other.copy()
        one.reserve(capacity)
        two.reserve(capacity)
        both = zip(one.layers, two.layers, strict=True)
        layers = [(torch.cat([k, k2]), torch.cat([v, v2])) for (k, v), (k2, v2) in both]
        return type(self)(layers, torch.cat([self.lengths, other.lengths]))


def _slice(rows: Sequence[int]) -> slice | Sequence[int]:
    """Neighbours as a slice, which reads and writes them in place."""
    start, end = rows[0], rows[-1] + 1
    return slice(start, end) if list(rows) == list(range(start, end)) else rows


class Block(Protocol):
    """Rows of one pass: attend to `query`, `key`, `value` [R, heads, W, head size] in layer `layer`."""

    rows: int
    width: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, /) -> Tensor: ...


class Reading:
    """Prompts, padded on the right: each token sees those before it. What they say may be remembered."""

    def __init__(self, rows: int, width: int, memory: Memory | None = None, layers: int = 0) -> None:
        """layers: of a model whose last one is asked only about each row's last token; 0 asks about all."""
        self.rows, self.width, self._memory, self._layers = rows, width, memory, layers
        self.said: tuple[Tensor, Tensor] | None = None
        """keys and values of the layer that attended last, for blocks behind this one"""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.said = key, value
        if self._memory is not None:
            self._memory.layers.append((key.contiguous(), value.contiguous()))
            if layer == self._layers - 1:
                return self._last(query, key, value, scale)
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )

    def _last(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of each row's last token; 0 for the others, which nothing looks at."""
        assert self._memory is not None
        last, rows = self._memory.lengths - 1, torch.arange(self.rows, device=query.device)
        mask = torch.arange(self.width, device=query.device) <= last[:, None]
        found = torch.zeros_like(query)
        asked = query[rows, :, last][:, :, None]
        found[rows, :, last] = _masked(asked, key, value, mask[:, None, None], scale)[:, :, 0]
        return found


class Branching:
    """Answers behind prompts: they see their prompt and what `mask` [R, 1, W, P + W] allows of themselves."""

    def __init__(self, rows: int, width: int, mask: Tensor, behind: "Memory | Reading") -> None:
        self.rows, self.width, self._mask, self._behind = rows, width, mask, behind

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        earlier = self._behind.said if isinstance(self._behind, Reading) else self._behind.layers[layer]
        assert earlier is not None, "a prompt is read before its answers"
        columns = self._mask.shape[-1] - self.width
        keys = torch.cat([earlier[0][:, :, :columns], key], dim=2)
        values = torch.cat([earlier[1][:, :, :columns], value], dim=2)
        return _masked(query, keys, values, self._mask, scale)


class Continuing:
    """One more token for each row of a memory, which sees all the row has read."""

    width = 1

    def __init__(self, memory: Memory, columns: int) -> None:
        """columns: how many of the memory are looked at; at least one more than any row has read."""
        self.rows = len(memory.lengths)
        self._memory, self._columns, self._at = memory, columns, memory.lengths.clone()
        every = torch.arange(columns, device=memory.lengths.device)
        self._mask = (every <= memory.lengths[:, None])[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self._memory.layers[layer]
        rows = torch.arange(self.rows, device=key.device)
        keys[rows, :, self._at], values[rows, :, self._at] = key[:, :, 0], value[:, :, 0]
        keys, values = keys[:, :, : self._columns], values[:, :, : self._columns]
        if torch.compiler.is_compiling():
            seen = _one_query if query.shape[1] == keys.shape[1] else _masked
        else:
            # Of half precision, torch's own keeps the scores in fp32.
            seen = _few_queries if query.device.type == "cpu" and query.element_size() > 2 else _masked
        return seen(query, keys, values, self._mask, scale)


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of a row's one query as two sums, which torch.compile makes kernels that copy nothing."""
    scores = (query.float() * key.float()).sum(-1) * scale
    weights = scores.masked_fill(~mask[:, :, 0], -torch.inf).softmax(-1)
    return (weights[..., None] * value.float()).sum(-2, keepdim=True).to(query.dtype)


def _few_queries(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of a row's one query as two products: on a CPU faster than torch's own function."""
    folded = query.reshape(len(query), key.shape[1], -1, query.shape[3]) * scale
    # Keys come first: MKL takes twice as long for the product of few rows by many columns.
    scores = (key @ folded.transpose(2, 3)).transpose(2, 3)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ value).reshape(query.shape)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    # Grouped queries become further queries of their one key head, so that no key is copied.
    width = query.shape[2]
    folded = query.reshape(len(query), key.shape[1], groups * width, query.shape[3])
    mask = mask.repeat(1, 1, groups, 1) if mask.shape[2] > 1 else mask
    found = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return found.reshape(query.shape)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    blocks: Sequence[Block] | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, head size] to [1, T, heads, head size]."""
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **further)
    sizes = [block.rows * block.width for block in blocks]
    parts = zip(*(torch.split(x[0].transpose(0, 1), sizes) for x in (query, key, value)), strict=True)
    found = []
    with sdpa_kernel(_REPEATABLE):
        for block, part in zip(blocks, parts, strict=True):
            q, k, v = (x.view(block.rows, block.width, *x.shape[1:]).transpose(1, 2) for x in part)
            found.append(block.attend(module.layer_idx, q, k, v, scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(found)[None], None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
