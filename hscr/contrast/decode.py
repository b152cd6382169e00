"""Free decoding from P_diff (HSCR Eqs. 3, 4; VCD, arXiv 2311.16922) by continuous batching of both streams.

Each slot holds one answer as two rows of one batch: with all visual tokens, and with the rest of them
dropped. A step is one pass over all rows; a finished answer leaves its slot to the next request, so that none
waits for the longest, and memory depends on the number of slots alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from hscr.contrast.contrast import plausible, quantised
from hscr.contrast.degrade import seeded
from hscr.models.attention import Memory
from hscr.models.language import View
from hscr.models.vlm import VLM

_READ_AT_ONCE = 4


@dataclass(frozen=True)
class Request:
    """One answer to be decoded."""

    key: str
    """names the answer, and its random draws"""
    prompt: list[int]
    full: View
    dropped: View


@dataclass(frozen=True)
class Decoded:
    key: str
    ids: list[int]
    """end-of-sequence last, unless `max_tokens` came first"""


@dataclass(frozen=True)
class Rule:
    """How the next token is taken from P_diff."""

    beta: float = 0.9
    """contrast weight of Eq. 3"""
    plausibility: float = 0.0
    """share of the full branch's top probability a token must reach (VCD's cut); 0 is off"""
    sample: bool = False
    """draw from P_diff instead of its most probable token, ties to the lowest id"""
    seed: int = 0

    def choose(self, vlm: VLM, full: Tensor, dropped: Tensor, slots: Sequence["_Slot"]) -> Tensor:
        """[R] tokens from the last hidden states [R, d] of both streams."""
        # The head is linear, so the contrast of the states gives that of the logits at half the work.
        contrast = (1 + self.beta) * full.float() - self.beta * dropped.float()
        scores = vlm.logits(contrast.to(full.dtype))
        if self.plausibility:
            allowed = plausible(vlm.logits(full).log_softmax(-1), self.plausibility)
            scores = torch.where(allowed, scores, -torch.inf)
        if not self.sample:
            return quantised(scores - scores.amax(-1, keepdim=True)).argmax(-1)
        probabilities = zip(scores.softmax(-1).cpu(), slots, strict=True)
        drawn = [torch.multinomial(row, 1, generator=self._draws(slot)) for row, slot in probabilities]
        return torch.cat(drawn).to(scores.device)

    def _draws(self, slot: "_Slot") -> torch.Generator:
        if slot.generator is None:
            slot.generator = seeded("P_diff", slot.request.key, self.seed)
        return slot.generator


@dataclass
class _Slot:
    request: Request
    ids: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None


def decode(
    vlm: VLM,
    requests: Iterable[Request],
    rule: Rule,
    *,
    stop_id: int | None,
    slots: int = 64,
    max_tokens: int = 64,
    compiled: bool = False,
) -> Iterator[Decoded]:
    """Answers in the order in which they end, each of at most `max_tokens`; `stop_id` None ends none earlier.

    A request's answer does not depend on its batch mates (to fp32 rounding, whose ties the rule breaks).
    `compiled` runs the steps through torch.compile, on a GPU as CUDA graphs: always over all slots and all
    columns, so it pays where starting kernels costs more than that.
    """
    waiting = iter(requests)
    batch = _Batch(vlm, rule, slots, max_tokens, compiled=compiled)
    while True:
        batch.admit(list(islice(waiting, batch.free)))
        if not batch.slots:
            return
        yield from batch.advance(stop_id)


class _Batch:
    """The slots in use, which are the first rows of both memories."""

    def __init__(self, vlm: VLM, rule: Rule, size: int, max_tokens: int, *, compiled: bool) -> None:
        self.slots: list[_Slot] = []
        self._vlm, self._rule, self._size, self._max_tokens = vlm, rule, size, max_tokens
        self._memories: list[Memory] = []
        width = vlm.model.config.text_config.hidden_size
        self._hidden = torch.zeros(2, size, width, dtype=vlm.model.dtype, device=vlm.device)
        self._positions = torch.zeros(2, size, dtype=torch.long, device=vlm.device)
        mode = "reduce-overhead" if vlm.device.type == "cuda" else None
        self._compiled = torch.compile(vlm.read_on, dynamic=False, mode=mode) if compiled else None

    @property
    def free(self) -> int:
        """How many requests may enter now: several at a time, so that prompts are read in batches."""
        free = self._size - len(self.slots)
        return free if free >= min(self._size, _READ_AT_ONCE) or not self.slots else 0

    def admit(self, requests: Sequence[Request]) -> None:
        for start in range(0, len(requests), _READ_AT_ONCE):
            self._read(requests[start : start + _READ_AT_ONCE])

    def advance(self, stop_id: int | None) -> list[Decoded]:
        """One token more for each slot; gives back the answers that it ends."""
        used = len(self.slots)
        tokens = self._rule.choose(self._vlm, self._hidden[0, :used], self._hidden[1, :used], self.slots)
        for slot, token in zip(self.slots, tokens.tolist(), strict=True):
            slot.ids.append(token)
        ended = [slot.ids[-1] == stop_id or len(slot.ids) == self._max_tokens for slot in self.slots]
        done = [r for r, end in enumerate(ended) if end]
        answers = [Decoded(self.slots[r].request.key, self.slots[r].ids) for r in done]
        for r in reversed(done):
            self._leave(r)
        if self.slots:
            self._step()
        return answers

    def _read(self, requests: Sequence[Request]) -> None:
        """Prefill both streams of all requests in one pass, and give each a slot."""
        count, start = len(requests), len(self.slots)
        views = [*(request.full for request in requests), *(request.dropped for request in requests)]
        context = self._vlm.prefill(self._vlm.embed([request.prompt for request in requests] * 2, views))
        if not self._memories:
            like = context.parts[0].memory
            self._memories = [Memory.blank(like, self._size, 0) for _ in range(2)]
        for part in context.parts:
            for stream, memory in enumerate(self._memories):
                taken = [i for i, row in enumerate(part.rows) if row // count == stream]
                if not taken:
                    continue
                memory.reserve(part.memory.capacity + self._max_tokens)
                memory.put([start + part.rows[i] % count for i in taken], part.memory, taken)
        self._hidden[:, start : start + count] = context.last.view(2, count, -1)
        ends = torch.tensor(context.ends, device=self._vlm.device)
        self._positions[:, start : start + count] = ends.view(2, count)
        self.slots += [_Slot(request) for request in requests]

    def _step(self) -> None:
        used = len(self.slots)
        ids = [slot.ids[-1] for slot in self.slots]
        if self._compiled is None:
            memories = [memory.first(used) for memory in self._memories]
            tokens = torch.tensor(ids * 2, device=self._vlm.device)
            hidden = self._vlm.step(memories, tokens, self._positions[:, :used].flatten())
            self._hidden[:, :used] = hidden.view(2, used, -1)
        else:
            # Free slots go along: what they read is overwritten when a request takes them.
            tokens = torch.tensor((ids + [0] * (self._size - used)) * 2, device=self._vlm.device)
            columns = [memory.capacity for memory in self._memories]
            hidden = self._compiled(self._memories, tokens, self._positions.flatten(), columns)
            self._hidden = hidden.view(2, self._size, -1).clone()
            for memory in self._memories:
                memory.lengths[:used] += 1
        self._positions[:, :used] += 1

    def _leave(self, slot: int) -> None:
        """Free a slot; the last one in use takes its rows."""
        last = len(self.slots) - 1
        if slot != last:
            for memory in self._memories:
                memory.put([slot], memory, [last])
            self._hidden[:, slot], self._positions[:, slot] = self._hidden[:, last], self._positions[:, last]
            self.slots[slot] = self.slots[last]
        self.slots.pop()
