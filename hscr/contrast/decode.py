"""Free decoding from P_diff (HSCR Eqs. 3, 4; VCD, arXiv 2311.16922) by continuous batching of both streams.

Each slot holds one answer as two rows of one batch: with all visual tokens, and with the rest of them
dropped. A step is one pass over all rows; a finished answer leaves its slot to the next request, so that none
waits for the longest, and memory depends on the number of slots alone.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hscr.contrast.contrast import first_best, plausible
from hscr.contrast.degrade import seeded
from hscr.errors import InvalidConfig
from hscr.models.attention import Memory
from hscr.models.language import Context, View
from hscr.models.vlm import VLM

_READ_AT_ONCE = 8
_COLUMNS = 64
"""compiled steps are made anew for each width of the memories, so these grow by so many columns at once"""


@dataclass(frozen=True)
class Request:
    """Answers to be decoded behind one prompt, which is read once for all of them."""

    key: str
    """names the answers' random draws"""
    prompt: list[int]
    full: View
    dropped: View
    count: int = 1
    """how many; they differ where the rule draws"""


@dataclass(frozen=True)
class Decoded:
    key: str
    number: int
    """from 0 among the answers of its request"""
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
            return first_best(scores)
        probabilities = zip(scores.softmax(-1).cpu(), slots, strict=True)
        drawn = [torch.multinomial(row, 1, generator=self._draws(slot)) for row, slot in probabilities]
        return torch.cat(drawn).to(scores.device)

    def _draws(self, slot: "_Slot") -> torch.Generator:
        if slot.generator is None:
            slot.generator = seeded("P_diff", slot.key, slot.number, self.seed)
        return slot.generator


@dataclass
class _Slot:
    key: str
    number: int
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
    A request that asks for more answers than there are slots raises InvalidConfig.

    `compiled` runs the steps through torch.compile, on a GPU as CUDA graphs: always over all slots and all
    columns, so it pays where starting kernels costs more than that, and many answers share the compilation.
    """
    waiting = _Waiting(requests, slots)
    batch = _Batch(vlm, rule, slots, max_tokens, compiled=compiled)
    while True:
        batch.admit(waiting)
        if not batch.slots:
            return
        yield from batch.advance(stop_id)


class _Waiting:
    """Requests in their order, each held back until there is room for all its answers."""

    def __init__(self, requests: Iterable[Request], slots: int) -> None:
        self._requests, self._slots = iter(requests), slots
        self._next = self._checked()

    def take(self, room: int) -> list[Request]:
        """Some of those that fit into `room` slots, few enough to be read in one pass."""
        taken: list[Request] = []
        while self._next is not None and self._next.count <= room and len(taken) < _READ_AT_ONCE:
            taken.append(self._next)
            room -= self._next.count
            self._next = self._checked()
        return taken

    def _checked(self) -> Request | None:
        request = next(self._requests, None)
        if request is not None and request.count > self._slots:
            raise InvalidConfig(
                f"{request.count} answers were asked of one prompt, but there are {self._slots} slots.",
                remedy="Ask for fewer candidates or allow more slots.",
            )
        return request


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

    def admit(self, waiting: _Waiting) -> None:
        """Fill free slots once there are several, so that prompts are read in batches."""
        room = self._size - len(self.slots)
        if self.slots and room < min(self._size, _READ_AT_ONCE):
            return
        while requests := waiting.take(self._size - len(self.slots)):
            self._read(requests)

    def advance(self, stop_id: int | None) -> list[Decoded]:
        """One token more for each slot; gives back the answers that it ends."""
        used = len(self.slots)
        tokens = self._rule.choose(self._vlm, self._hidden[0, :used], self._hidden[1, :used], self.slots)
        for slot, token in zip(self.slots, tokens.tolist(), strict=True):
            slot.ids.append(token)
        ended = [slot.ids[-1] == stop_id or len(slot.ids) == self._max_tokens for slot in self.slots]
        done = [r for r, end in enumerate(ended) if end]
        answers = [Decoded(slot.key, slot.number, slot.ids) for slot in map(self.slots.__getitem__, done)]
        for r in reversed(done):
            self._leave(r)
        if self.slots:
            self._step()
        return answers

    def _read(self, requests: Sequence[Request]) -> None:
        """Prefill both streams of all requests in one pass, and give each answer a slot."""
        # In the order in which a pass lays out its rows: what neighbours have read is copied as one piece.
        requests = sorted(requests, key=lambda request: -len(request.prompt))
        views = [*(request.full for request in requests), *(request.dropped for request in requests)]
        context = self._vlm.prefill(self._vlm.embed([request.prompt for request in requests] * 2, views))
        if not self._memories:
            like = context.parts[0].memory
            self._memories = [Memory.blank(like, self._size, 0) for _ in range(2)]
        start = len(self.slots)
        self.slots += [_Slot(request.key, n) for request in requests for n in range(request.count)]
        of_slot = [number for number, request in enumerate(requests) for _ in range(request.count)]
        for stream, memory in enumerate(self._memories):
            rows = [stream * len(requests) + number for number in of_slot]
            self._fill(memory, start, rows, context)
            self._hidden[stream, start : len(self.slots)] = context.last[rows]
            ends = torch.tensor([context.ends[row] for row in rows], device=self._vlm.device)
            self._positions[stream, start : len(self.slots)] = ends

    def _fill(self, memory: Memory, start: int, rows: Sequence[int], context: Context) -> None:
        """Copy what rows `rows` of the context have read into the slots from `start` on."""
        for part in context.parts:
            place = {row: i for i, row in enumerate(part.rows)}
            slots = [slot for slot, row in enumerate(rows, start) if row in place]
            if slots:
                self._reserve(memory, part.memory.capacity + self._max_tokens)
                memory.put(slots, part.memory, [place[rows[slot - start]] for slot in slots])

    def _reserve(self, memory: Memory, columns: int) -> None:
        if self._compiled is None:
            memory.reserve(columns)
        elif columns > memory.capacity:
            memory.reserve(math.ceil(columns / _COLUMNS) * _COLUMNS)
            memory.stay()

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
