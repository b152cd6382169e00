"""The OpenAI-compatible engine protocol as this project speaks it, and its one client.

Any server that loads LoRA adapters at run time under vLLM's endpoints will do: vLLM in production,
`service.embedded` on a laptop. The client retries nothing: whether an answer may be asked for again is for
its caller to decide.
"""

import json
import socket
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import aiohttp
from aiohttp.connector import AddrInfoType
from pydantic import Field

from hscr.errors import EngineError, EngineInterrupted, EngineRejected, EngineUnavailable, InvalidInput
from hscr.records import Record, Sampling

KEEP_ALIVE_SECONDS = 2.0
"""Below the 5 s after which uvicorn, and so vLLM, hangs up: a POST on a closed connection would be lost."""
_UNAVAILABLE = {502, 503, 504}
_TEACHER_FORCED = {
    "prompt_logprobs": 0,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "max_tokens": 1,
}


class Message(Record):
    role: Literal["system", "user", "assistant"] = "user"
    text: str


class VisualTokens(Record):
    """An image as the language model sees it: `rows` projected visual tokens in `data`, by `torch.save`.

    vLLM reads them under `--enable-mm-embeds`, and any number of them: whoever sends them counts them.
    """

    data: bytes
    rows: int = Field(gt=0)


class ChatRequest(Record):
    """One question to one model. `image` (PNG, JPEG or its tokens) precedes the first user message's text."""

    model: str
    messages: tuple[Message, ...]
    image: bytes | VisualTokens | None = None
    sampling: Sampling = Sampling()
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="alternatives reported per token; None: no log-probabilities"
    )

    @classmethod
    def ask(
        cls,
        model: str,
        question: str,
        image: bytes | None = None,
        *,
        sampling: Sampling | None = None,
        top_logprobs: int | None = None,
    ) -> Self:
        """A single user turn."""
        messages = (Message(text=question),)
        settings = sampling or Sampling()
        return cls(model=model, messages=messages, image=image, sampling=settings, top_logprobs=top_logprobs)

    def body(self, *, stream: bool = False) -> dict[str, Any]:
        """The JSON body of POST /v1/chat/completions."""
        body: dict[str, Any] = {"model": self.model, "messages": self._messages()}
        body |= self.sampling.model_dump(mode="json")
        if self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = [{"role": m.role, "content": m.text} for m in self.messages]
        if self.image is not None:
            first = next(m for m in messages if m["role"] == "user")
            first["content"] = [_part(self.image), {"type": "text", "text": first["content"]}]
        return messages


class Expected(Record):
    """The token ids that an engine has to read for the score of a given answer to mean anything."""

    prompt: tuple[int, ...] = Field(description="as many `image_token` as the image has visual tokens")
    answer: tuple[int, ...] = Field(min_length=1)
    image_token: int

    @property
    def rows(self) -> int:
        """Visual tokens of the image."""
        return self.prompt.count(self.image_token)


class TokenLogprob(Record):
    """One answer token, the end-of-sequence token included; natural logarithms before temperature."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = Field(default=(), description="the most probable, best first")


class Usage(Record):
    prompt_tokens: int = Field(description="visual tokens included")
    completion_tokens: int


class ChatResult(Record):
    text: str = Field(description="without the white space that a template leaves before it")
    finish_reason: str
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None
    model: str = Field(description="the model or adapter that answered, as the engine states it")


class ChatDelta(Record):
    """A piece of a streamed answer. The texts concatenate to the whole; `usage` comes last."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    model: str


class EngineModel(Record):
    """What GET /v1/models lists: the base model, or an adapter whose `parent` is the base model."""

    id: str
    parent: str | None
    root: str | None


class EngineVersion(Record):
    """`engine` and the fields after it are stated by the embedded engine; vLLM gives its version only."""

    version: str
    engine: str = "vllm"
    numeric_mode: str | None = None
    model_digest: str | None = None
    template_digest: str | None = None


class EngineClient:
    """Speaks to one engine at `address` (base URL). Use as an async context manager, or call `close`.

    `timeout` bounds the silence between two reads, in seconds: of a whole answer, or between two deltas.
    `connect_timeout` bounds how long the engine's host may confirm nothing: a packet lost on the way is found
    out long before an engine is thought silent, also on a connection that was used before (RFC 5482).

    Every method may raise EngineUnavailable (no connection, no reply in time, or 502 to 504), EngineRejected
    (4xx, with its status) or EngineError (500, or a reply that is not the protocol's).
    """

    def __init__(self, address: str, *, timeout: float = 120.0, connect_timeout: float = 5.0) -> None:
        self.address = address.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout, sock_read=timeout)
        self._connect_timeout = connect_timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def chat(self, request: ChatRequest) -> ChatResult:
        """The whole answer. Cancelling the call stops the request in the engine."""
        async with self._call("POST", "/v1/chat/completions", request.body()) as response:
            reply = await response.read()
        with _protocol(self.address):
            answer = json.loads(reply)
            choice = answer["choices"][0]
            return ChatResult(
                text=(choice["message"]["content"] or "").lstrip(),
                finish_reason=choice["finish_reason"],
                usage=_usage(answer["usage"]),
                logprobs=_logprobs(choice),
                model=answer["model"],
            )

    async def score(self, request: ChatRequest, expected: Expected) -> list[float]:
        """Natural log-prob [T] of each token of a given answer, which is the request's last message.

        An engine takes any number of visual tokens and renders any chat template without complaint, so the
        rows are counted before they are sent, and all tokens it read are compared afterwards.
        Raises InvalidInput for another number of rows, EngineError when other tokens were read.
        """
        _require_rows(request, expected)
        read = await self.read(request)
        if [token for token, _ in read] != [*expected.prompt, *expected.answer][1:]:
            raise EngineError(
                f"{self.address} read other tokens than expected, so its log-probs mean something else.",
                remedy="Start engine and workers with one model folder: its tokenizer, chat template, sizes.",
            )
        return [logprob for _, logprob in read[-len(expected.answer) :]]

    async def read(self, request: ChatRequest) -> list[tuple[int, float]]:
        """Id and natural log-prob of every token but the first, of a chat whose last message is left open."""
        body = request.body() | _TEACHER_FORCED
        async with self._call("POST", "/v1/chat/completions", body) as response:
            reply = await response.read()
        with _protocol(self.address):
            return [_first(place) for place in json.loads(reply)["prompt_logprobs"][1:]]

    async def stream(self, request: ChatRequest) -> AsyncIterator[ChatDelta]:
        """The answer as it is made. Closing the iterator stops the request in the engine.

        Raises EngineInterrupted when the stream breaks off before its end.
        """
        async with self._call("POST", "/v1/chat/completions", request.body(stream=True)) as response:
            begun = False
            try:
                async for frame in _frames(response):
                    with _protocol(self.address):
                        delta = _delta(frame, begun=begun)
                    begun = begun or bool(delta.text)
                    yield delta
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise EngineInterrupted(
                    f"The stream from {self.address} broke off: {error}.", remedy="Ask again."
                ) from error

    async def models(self) -> list[EngineModel]:
        async with self._call("GET", "/v1/models") as response:
            reply = await response.read()
        with _protocol(self.address):
            listed = json.loads(reply)["data"]
            return [EngineModel(id=m["id"], parent=m.get("parent"), root=m.get("root")) for m in listed]

    async def load_adapter(self, name: str, path: Path | str) -> None:
        """Load the PEFT folder `path`, which the engine's machine must see, under the unused `name`."""
        body = {"lora_name": name, "lora_path": str(path)}
        async with self._call("POST", "/v1/load_lora_adapter", body) as response:
            await response.read()

    async def unload_adapter(self, name: str) -> None:
        """Forget `name` at once. Requests that run with it end undisturbed."""
        async with self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name}) as response:
            await response.read()

    async def health(self) -> bool:
        """Whether the engine answers and its model loop is alive."""
        try:
            async with self._call("GET", "/health"):
                return True
        except EngineUnavailable:
            return False

    async def version(self) -> EngineVersion:
        async with self._call("GET", "/version") as response:
            reply = await response.read()
        with _protocol(self.address):
            stated = json.loads(reply).items()
            return EngineVersion(**{key: value for key, value in stated if key in EngineVersion.model_fields})

    @asynccontextmanager
    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._http().request(method, self.address + path, json=body) as response:
                if response.status >= 400:
                    raise _refusal(response.status, await response.text())
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineUnavailable(
                f"The engine at {self.address} did not answer ({type(error).__name__}: {error}).",
                remedy="Check that it runs and try again.",
            ) from error

    def _http(self) -> aiohttp.ClientSession:
        # A session belongs to an event loop, which the constructor may not have yet.
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=KEEP_ALIVE_SECONDS,
                socket_factory=partial(_socket, unconfirmed=self._connect_timeout),
            )
            self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        return self._session


def _socket(address: AddrInfoType, *, unconfirmed: float) -> socket.socket:
    """It breaks when the other host has confirmed nothing for some `unconfirmed` seconds, idle or not."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        made.setsockopt(socket.IPPROTO_TCP, option, max(1, round(unconfirmed / 2)))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * unconfirmed))
    return made


async def _frames(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The data frames of a server-sent event stream, up to `[DONE]`, which must come."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        with _protocol(str(response.url)):
            frame = json.loads(data)
        if "error" in frame:
            raise EngineInterrupted(f"The engine failed: {frame['error']}.", remedy="Ask again.")
        yield frame
    raise aiohttp.ClientPayloadError("it ended without [DONE]")


def _delta(frame: dict[str, Any], *, begun: bool) -> ChatDelta:
    usage = frame.get("usage")
    if not frame["choices"]:
        return ChatDelta(model=frame["model"], usage=usage and _usage(usage))
    choice = frame["choices"][0]
    text = choice["delta"].get("content") or ""
    return ChatDelta(
        text=text if begun else text.lstrip(),
        logprobs=_logprobs(choice),
        finish_reason=choice["finish_reason"],
        usage=usage and _usage(usage),
        model=frame["model"],
    )


def _usage(usage: dict[str, Any]) -> Usage:
    return Usage(prompt_tokens=usage["prompt_tokens"], completion_tokens=usage["completion_tokens"])


def _logprobs(choice: dict[str, Any]) -> tuple[TokenLogprob, ...] | None:
    listed = choice.get("logprobs")
    if listed is None:
        return None
    return tuple(
        TokenLogprob(
            token=entry["token"],
            logprob=entry["logprob"],
            top=tuple((other["token"], other["logprob"]) for other in entry["top_logprobs"]),
        )
        for entry in listed["content"]
    )


def _require_rows(request: ChatRequest, expected: Expected) -> None:
    if isinstance(request.image, VisualTokens) and request.image.rows != expected.rows:
        raise InvalidInput(
            f"{request.image.rows} visual tokens cannot stand for an image, which has {expected.rows}.",
            remedy="Set those to be overlooked to zero; no row may be missing.",
        )


def _first(place: dict[str, dict[str, Any]]) -> tuple[int, float]:
    """The token that the prompt has at this place; alternatives follow it."""
    token, entry = next(iter(place.items()))
    return int(token), float(entry["logprob"])


def _refusal(status: int, body: str) -> EngineError:
    message = _message(body)
    if status in _UNAVAILABLE:
        return EngineUnavailable(f"The engine answered {status}: {message}", remedy="Try again shortly.")
    if status >= 500:
        return EngineError(f"The engine failed with {status}: {message}", remedy="See its log.")
    return EngineRejected(f"The engine refused with {status}: {message}", status=status)


def _message(body: str) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:500]


@contextmanager
def _protocol(address: str) -> Iterator[None]:
    """Turn a reply of another shape into EngineError."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise EngineError(
            f"{address} answered something that is no OpenAI-compatible reply ({error!r}).",
            remedy="Check that the address is an engine's.",
        ) from error


def _part(image: bytes | VisualTokens) -> dict[str, Any]:
    if isinstance(image, VisualTokens):
        return {"type": "image_embeds", "image_embeds": b64encode(image.data).decode()}
    url = f"data:{_media_type(image)};base64,{b64encode(image).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _media_type(image: bytes) -> str:
    return "image/png" if image.startswith(b"\x89PNG") else "image/jpeg"
