"""Chat completions: from a request's body to a running sequence, and from its pieces to OpenAI's frames."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from time import time
from typing import Any

from hscr.errors import InvalidQuestion
from hscr.models.vlm import VLM
from hscr.records import new_id
from service.embedded.adapters import AdapterRegistry
from service.embedded.batching import Batcher
from service.embedded.prompts import Pictures, Prompt, prepare
from service.embedded.sampling import Sampler
from service.embedded.schemas import ChatCompletionRequest, error_body, usage_body
from service.embedded.sequences import Piece, Sequence, Token
from service.embedded.text import TextStream

_LOWEST = -9999.0
"""JSON knows no infinity; this is vLLM's stand-in for it."""


class Chat:
    """Starts chat requests on the batcher."""

    def __init__(self, vlm: VLM, batcher: Batcher, adapters: AdapterRegistry) -> None:
        self._vlm = vlm
        self._pictures = Pictures(vlm)
        self._batcher = batcher
        self._adapters = adapters
        # One thread: a tokenizer must not encode in two at once, and images must not hold up the event loop.
        self._preparer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")
        self._token_text = lru_cache(maxsize=None)(lambda token_id: vlm.tokenizer.decode([token_id]))

    async def start(self, request: ChatCompletionRequest) -> "Answer":
        """Queue a request. Raises NotFound (model), InvalidInput, EngineUnavailable."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        adapter = self._adapters.lease(request.model)

        def arrive(piece: Piece) -> None:
            pieces.put_nowait(piece)
            if piece.last:
                self._adapters.release(adapter)

        try:
            prompt = await loop.run_in_executor(
                self._preparer,
                partial(
                    prepare,
                    self._vlm,
                    self._pictures,
                    request.messages,
                    continued=request.continue_final_message,
                ),
            )
            key = adapter.key if adapter else None
            sequence = self._sequence(
                request, prompt, key, lambda piece: loop.call_soon_threadsafe(arrive, piece)
            )
            self._batcher.submit(sequence)
        except BaseException:
            self._adapters.release(adapter)
            raise
        return Answer(request, sequence, pieces, self._token_text)

    def _sequence(
        self,
        request: ChatCompletionRequest,
        prompt: Prompt,
        adapter: str | None,
        deliver: Callable[[Piece], object],
    ) -> Sequence:
        return Sequence(
            prompt=prompt,
            adapter=adapter,
            sampler=Sampler.seeded(request.temperature, request.top_p, request.seed),
            text=TextStream(self._decode, request.stop_strings),
            limit=self._limit(request, prompt),
            top_logprobs=request.top_logprobs if request.logprobs else None,
            eos_ids=frozenset() if request.ignore_eos else frozenset({self._vlm.eos_id}),
            deliver=deliver,
            prompt_logprobs=request.prompt_logprobs,
        )

    def _limit(self, request: ChatCompletionRequest, prompt: Prompt) -> int:
        room = self._vlm.context - prompt.length
        if (request.token_limit or 0) > room:
            raise InvalidQuestion(
                f"The prompt has {prompt.length} tokens, and {request.token_limit} more do not fit into the "
                f"context of {self._vlm.context}.",
                remedy=f"Ask for at most {room} tokens, or shorten the prompt.",
            )
        return request.token_limit or room

    def _decode(self, ids: list[int]) -> str:
        text: str = self._vlm.tokenizer.decode(ids, skip_special_tokens=True)
        return text


class Answer:
    """One answer on its way to its client, whole or in frames."""

    def __init__(
        self,
        request: ChatCompletionRequest,
        sequence: Sequence,
        pieces: asyncio.Queue[Piece],
        token_text: Callable[[int], str],
    ) -> None:
        self._request = request
        self._sequence = sequence
        self._pieces = pieces
        self._token_text = token_text
        self._head = {"id": new_id("chatcmpl"), "created": int(time()), "model": request.model}

    def cancel(self) -> None:
        """Stop the model's work on this answer; harmless after its end."""
        self._sequence.cancel()

    async def whole(self) -> dict[str, Any]:
        """The body of a reply in one piece. Raises what ended the answer early."""
        pieces = [piece async for piece in self._each()]
        if error := pieces[-1].error:
            raise error
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice({"message": message}, pieces)],
            "usage": self._usage(),
            "prompt_logprobs": self._prompt_logprobs(),
        }

    async def frames(self) -> AsyncIterator[str]:
        """The reply as server-sent events, ended by `[DONE]`."""
        yield self._frame([self._choice({"delta": {"role": "assistant", "content": ""}}, [])])
        async for piece in self._each():
            if piece.error:
                yield _event(error_body(str(piece.error), kind="InternalServerError", status=500))
            elif piece.text or piece.token or piece.last:
                yield self._frame([self._choice({"delta": {"content": piece.text}}, [piece])])
        options = self._request.stream_options
        if options and options.include_usage:
            yield self._frame([], usage=self._usage())
        yield "data: [DONE]\n\n"

    async def _each(self) -> AsyncIterator[Piece]:
        while True:
            piece = await self._pieces.get()
            yield piece
            if piece.last:
                return

    def _frame(self, choices: list[dict[str, Any]], **more: object) -> str:
        return _event({**self._head, "object": "chat.completion.chunk", "choices": choices, **more})

    def _choice(self, content: dict[str, Any], pieces: list[Piece]) -> dict[str, Any]:
        tokens = [self._entry(piece.token) for piece in pieces if piece.token]
        reason = pieces[-1].finish_reason if pieces else None
        return {
            "index": 0,
            **content,
            "logprobs": {"content": tokens} if tokens else None,
            "finish_reason": reason,
        }

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [self._candidate(token_id, logprob) for token_id, logprob in token.top]
        return {**self._candidate(token.id, token.logprob), "top_logprobs": top}

    def _prompt_logprobs(self) -> list[dict[str, Any] | None] | None:
        """vLLM's: per token of the prompt, by id, itself and its alternatives; nothing of the first."""
        if self._request.prompt_logprobs is None:
            return None
        return [None, *map(self._at_place, self._sequence.read)]

    def _at_place(self, token: Token) -> dict[str, Any]:
        ranked = [(token.id, token.logprob, token.rank)]
        ranked += [(*other, rank) for rank, other in enumerate(token.top, 1) if other[0] != token.id]
        return {
            str(token_id): {
                "logprob": max(logprob, _LOWEST),
                "rank": rank,
                "decoded_token": self._token_text(token_id),
            }
            for token_id, logprob, rank in ranked
        }

    def _candidate(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token_id)
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(text.encode())}

    def _usage(self) -> dict[str, int]:
        return usage_body(self._sequence.prompt.length, self._sequence.produced)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'), ensure_ascii=False)}\n\n"
