"""One request on its way through the model, and what it hands back at each step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Self

from torch import Tensor

from service.embedded.prompts import Prompt
from service.embedded.sampling import Sampler, best
from service.embedded.text import TextStream


@dataclass(frozen=True)
class Token:
    """A token and the most probable ones at its place: (id, natural log-probability), best first."""

    id: int
    logprob: float
    top: list[tuple[int, float]]
    rank: int
    """1 for the most probable"""

    @classmethod
    def of(cls, token_id: int, logprobs: Tensor, alternatives: int) -> Self:
        """What log-probabilities [V] say of a token."""
        own = logprobs[token_id]
        return cls(
            token_id,
            float(own),
            best(logprobs, alternatives) if alternatives else [],
            int((logprobs > own).sum()) + 1,
        )


@dataclass(frozen=True)
class Piece:
    """What one step added to an answer; the last one carries `finish_reason` or `error`."""

    text: str = ""
    token: Token | None = None
    finish_reason: str | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def broken_off(self) -> bool:
        """Whether the answer ended before its time."""
        return self.error is not None or self.finish_reason == "abort"


@dataclass(eq=False)
class Sequence:
    """A prompt and its answer so far.

    `adapter` is the key of a loaded adapter or None for the base model; `limit` bounds the answer's tokens;
    `deliver` is called on the model's thread and gets exactly one last piece; `prompt_logprobs` counts the
    alternatives reported per token of the prompt, None reports nothing of it.
    """

    prompt: Prompt
    adapter: str | None
    sampler: Sampler
    text: TextStream
    limit: int
    top_logprobs: int | None
    eos_ids: frozenset[int]
    deliver: Callable[[Piece], object]
    prompt_logprobs: int | None = None
    read: list[Token] = field(default_factory=list)
    """the prompt's tokens from its second on, before the first piece is delivered; if asked for"""
    arrived: float = field(default_factory=monotonic)
    produced: int = 0
    last_id: int = -1
    cancelled: bool = False

    def cancel(self) -> None:
        """Stop before the next step; harmless after the end."""
        self.cancelled = True

    def advance(self, logprobs: Tensor) -> Piece:
        """Choose the next token from log-probabilities [V]; end-of-sequence counts but has no text."""
        self.last_id = self.sampler.pick(logprobs)
        self.produced += 1
        ended = self.last_id in self.eos_ids
        text = "" if ended else self.text.push(self.last_id)
        reason = "stop" if ended or self.text.stopped else "length" if self.produced == self.limit else None
        text += self.text.finish() if reason else ""
        return Piece(text, self._token(logprobs), reason)

    def _token(self, logprobs: Tensor) -> Token | None:
        return None if self.top_logprobs is None else Token.of(self.last_id, logprobs, self.top_logprobs)
