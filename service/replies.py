"""How an answer leaves: one JSON body, or server-sent events that end with the kept answer or an error."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.types import Message, Receive, Scope, Send

from hscr.errors import HscrError
from hscr.records import Answer
from service.answering import NO_USAGE, Ask, ClientGone, Finished, answered, begun, repeated, while_connected
from service.errors import Problem, problem
from service.logs import log
from service.schemas import AnswerView, Delta
from service.state import State

CLIENT_GONE = 499
"""What the log shows for a client that left; nobody receives it."""

Pieces = AsyncIterator[str | Finished]


@dataclass(frozen=True)
class Wire:
    """How one protocol writes a piece of text, the kept answer and a failure."""

    opening: bytes
    text: Callable[[str], bytes]
    finished: Callable[[Finished], bytes]
    failed: Callable[[Problem], bytes]


class Events(EventSourceResponse):
    """A stream that waits for its reader, and ends when the reader stops.

    A piece is sent when the one before it was taken, so what waits in memory is bounded by the buffers of two
    sockets, and then the engine has to wait. A client that takes nothing for `client_silence` seconds
    loses the stream, and with it its hold on a version: the body ends without its last chunk, which every
    HTTP client reports as an error.
    """

    def __init__(self, state: State, request: Request, pieces: Pieces, wire: Wire) -> None:
        self._state = state
        self._events = _events(state, request.url.path, pieces, wire)
        super().__init__(self._events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._state.settings

        async def timely_send(message: Message) -> None:
            async with asyncio.timeout(settings.client_silence):
                await send(message)

        try:
            async with (
                aclosing(self._events),
                asyncio.timeout(settings.request_deadline + settings.engine_silence),
            ):
                await super().__call__(scope, receive, timely_send)
        except TimeoutError:
            log().warning("client_too_slow")


async def reply(state: State, request: Request, ask: Ask, stack: AsyncExitStack, *, stream: bool) -> Response:
    """What POST /v1/vqa and /v1/captions give back."""
    earlier = await repeated(state, ask)
    try:
        if stream:
            return Events(state, request, await _pieces(state, request, ask, stack, earlier), _ANSWER)
        answer = earlier or (await while_connected(state, request, answered(state, ask, stack))).answer
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    return JSONResponse(AnswerView.of(answer).model_dump(mode="json"))


async def _pieces(
    state: State, request: Request, ask: Ask, stack: AsyncExitStack, earlier: Answer | None
) -> Pieces:
    if earlier is not None:
        return _again(earlier)
    making = await while_connected(state, request, begun(state, ask, stack))
    return making.pieces()


async def _events(state: State, path: str, pieces: Pieces, wire: Wire) -> AsyncGenerator[bytes]:
    ended = False
    try:
        yield wire.opening
        async for piece in pieces:
            ended = isinstance(piece, Finished)
            yield wire.finished(piece) if isinstance(piece, Finished) else wire.text(piece)
    except HscrError as error:
        ended = True
        log().warning("stream_failed", slug=error.slug)
        yield wire.failed(problem(error, path))
    finally:
        if not ended:
            state.metrics.aborted.inc()


async def _again(earlier: Answer) -> Pieces:
    yield earlier.text
    yield Finished(earlier, NO_USAGE)


_ANSWER = Wire(
    opening=b"",
    text=lambda text: format_sse_event(event="delta", data_str=Delta(text=text).model_dump_json()),
    finished=lambda end: format_sse_event(
        event="answer", data_str=AnswerView.of(end.answer).model_dump_json(), id=end.answer.id
    ),
    failed=lambda failure: format_sse_event(event="error", data_str=failure.model_dump_json()),
)
