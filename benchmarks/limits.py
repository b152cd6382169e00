"""What a machine can do, measured in the same run, and the least time that a benchmark's work takes at it.

Only what no implementation can leave out is counted: matrix products, attention, and reading what has been
read before from memory. A product of two numbers and their sum are two operations.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rates(NamedTuple):
    """Of one device."""

    flops: float
    """operations per second of a matrix product of a layer's shape"""
    bytes_per_s: float
    """of reading memory"""

    @classmethod
    def measure(cls, device: str, dtype: torch.dtype) -> "Rates":
        """Medians of a few rounds."""
        large = device == "cuda"
        rows, width, inner = (8192, 4096, 11008) if large else (2400, 256, 896)
        one = torch.randn(rows, width, device=device, dtype=dtype)
        other = torch.randn(width, inner, device=device, dtype=dtype)
        product = torch.empty(rows, inner, device=device, dtype=dtype)
        memory = torch.ones(1 << 30 if large else 1 << 26, device=device, dtype=torch.float32)
        return cls(
            2 * rows * width * inner / _seconds(lambda: torch.mm(one, other, out=product), device),
            memory.numel() * 4 / _seconds(memory.sum, device),
        )


def _seconds(call: Callable[[], Tensor], device: str) -> float:
    taken = []
    for _ in range(20):
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[5:])


class Work(NamedTuple):
    """Operations of, and bytes read by, one LLaVA of `config` whose numbers take `size` bytes."""

    config: Any
    size: int

    @property
    def layer(self) -> int:
        """Weights of a layer of the language model."""
        text = self.config.text_config
        head = text.hidden_size // text.num_attention_heads
        attention = 2 * text.hidden_size * (text.num_attention_heads + text.num_key_value_heads) * head
        return attention + 3 * text.hidden_size * text.intermediate_size

    @property
    def cache_row(self) -> int:
        """Numbers that a layer remembers of one token."""
        text = self.config.text_config
        return 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)

    @property
    def layers(self) -> int:
        return int(self.config.text_config.num_hidden_layers)

    def image(self) -> float:
        """Encoding one image, as far as the layer whose states are used."""
        vision, text = self.config.vision_config, self.config.text_config
        patches = (vision.image_size // vision.patch_size) ** 2
        used = self.config.vision_feature_layer % (vision.num_hidden_layers + 1)
        weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        tower = used * (2 * patches * weights + 4 * patches**2 * vision.hidden_size)
        embedding = 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size
        return tower + embedding + 2 * patches * text.hidden_size * (vision.hidden_size + text.hidden_size)

    def prompt(self, tokens: int) -> float:
        """Reading one prompt: the last layer only remembers."""
        text = self.config.text_config
        products = 2 * tokens * (self.layer * (self.layers - 1) + text.hidden_size * self.cache_row)
        return products + (self.layers - 1) * 2 * tokens**2 * text.hidden_size

    def decoding(self, full: int, dropped: int, tokens: int) -> tuple[float, float]:
        """Operations and bytes, apart from the weights', of one answer of `tokens` behind both prompts."""
        text = self.config.text_config
        seen = tokens * (full + dropped + tokens)  # of both streams, over all steps
        head = 2 * text.hidden_size * text.vocab_size  # once: that of the contrast of both states
        operations = (
            tokens * (4 * self.layer * self.layers + head) + 4 * self.layers * seen * text.hidden_size
        )
        return operations, self.size * self.layers * self.cache_row * seen

    def weights(self) -> int:
        """Bytes of what each step of decoding reads, whatever the batch."""
        text = self.config.text_config
        return self.size * (self.layer * self.layers + text.hidden_size * text.vocab_size)


def decoding_floor(work: Work, rates: Rates, *, records: int, full: int, dropped: int, tokens: int) -> float:
    """Seconds for `records` answers, 64 at once, decoded behind prompts of `full` and `dropped` tokens."""
    operations, read = work.decoding(full, dropped, tokens)
    reading = records * (work.image() + work.prompt(full) + work.prompt(dropped)) / rates.flops
    read = records * read + tokens * math.ceil(records / 64) * work.weights()
    return reading + max(records * operations / rates.flops, read / rates.bytes_per_s)


def training_floor(work: Work, rates: Rates, *, prompt: int, answers: int, scored: int) -> float:
    """Seconds of a step on one record: its prompt and its answers' tokens once, `scored` of them with logits.

    Weights are frozen, so a backward pass costs as much as a forward one; with the reference's forward
    pass there are three. The image is encoded once.
    """
    text = work.config.text_config
    body = 2 * (prompt + answers) * work.layer * work.layers
    head = 2 * scored * text.hidden_size * text.vocab_size
    return (work.image() + 3 * (body + head)) / rates.flops
