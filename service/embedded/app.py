"""The HTTP side: OpenAI's chat protocol with vLLM's adapter endpoints, bodies and status codes.

| endpoint | |
|---|---|
| GET /v1/models | the base model, and adapters with their `parent` |
| POST /v1/chat/completions | text, at most one image (URL or `image_embeds`); `stream`, `prompt_logprobs` |
| POST /v1/load_lora_adapter, /v1/unload_lora_adapter | 200 text; 400 used or unfit; 404 unknown |
| GET /health | 200, or 503 when the model's thread has ended |
| GET /version, /metrics | what answers, and how busily |
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from hscr import __version__
from hscr.errors import AdapterRefused, Conflict, EngineUnavailable, HscrError, InvalidInput, NotFound
from hscr.faults import fault_point
from hscr.models.vlm import VLM
from service.embedded.adapters import AdapterRegistry
from service.embedded.batching import Batcher
from service.embedded.chat import Answer, Chat
from service.embedded.metrics import Metrics
from service.embedded.schemas import ChatCompletionRequest, LoadLoraRequest, UnloadLoraRequest, error_body

log = logging.getLogger(__name__)
BodyT = TypeVar("BodyT", bound=BaseModel)
MAX_BODY = 32 * 2**20
"""bytes"""
CLIENT_CLOSED_REQUEST = 499

_STATUS: dict[type[HscrError], tuple[HTTPStatus, str]] = {
    InvalidInput: (HTTPStatus.BAD_REQUEST, "BadRequestError"),
    AdapterRefused: (HTTPStatus.BAD_REQUEST, "BadRequestError"),
    Conflict: (HTTPStatus.BAD_REQUEST, "InvalidUserInput"),
    NotFound: (HTTPStatus.NOT_FOUND, "NotFoundError"),
    EngineUnavailable: (HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
}


def create_app(
    vlm: VLM, *, name: str, root: str, max_batch: int, max_loras: int, max_rank: int = 64
) -> FastAPI:
    """Serve `vlm` under `name`; `root` is the folder it came from. The model's thread starts at once."""
    metrics = Metrics(name)
    batcher = Batcher(vlm, max_batch, metrics.observe)
    adapters = AdapterRegistry(vlm, batcher, base=name, max_loras=max_loras, max_rank=max_rank)
    metrics.watch(batcher, adapters)
    chat = Chat(vlm, batcher, adapters)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.stop)

    app = FastAPI(title="Embedded engine", version=__version__, lifespan=lifespan)
    app.state.batcher = batcher
    _handle_errors(app)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards = [_card(name, root, None, vlm.context)]
        cards += [_card(adapter.name, adapter.path, name, vlm.context) for adapter in adapters.listed]
        return {"object": "list", "data": cards}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await _read(request, ChatCompletionRequest)
        answer = await chat.start(body)
        fault_point("engine.asked")
        return EventStream(answer) if body.stream else await _whole(answer, request)

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: Request) -> PlainTextResponse:
        body = await _read(request, LoadLoraRequest)
        await adapters.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: Request) -> PlainTextResponse:
        body = await _read(request, UnloadLoraRequest)
        await adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if batcher.alive else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {
            "version": __version__,
            "engine": "embedded",
            "numeric_mode": vlm.numeric_mode,
            "model_digest": vlm.digest,
            "template_digest": vlm.template_digest,
        }

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return app


class EventStream(StreamingResponse):
    """A streamed answer. However the response ends, the model stops working on it."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.frames(), media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


async def _whole(answer: Answer, request: Request) -> Response:
    """The answer in one piece, unless the client goes away first."""
    whole = asyncio.create_task(answer.whole())
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(whole.result()) if whole.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        answer.cancel()
        whole.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, model: type[BodyT]) -> BodyT:
    """The validated body. Raises HTTPException 413 before a large one is read, ValidationError."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"The body is larger than {MAX_BODY} bytes. Send a smaller image.")
    return model.model_validate_json(body)


def _card(name: str, root: str, parent: str | None, context: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "hscr",
        "root": root,
        "parent": parent,
        "max_model_len": context,
    }


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ValidationError)
    async def invalid(_: Request, error: ValidationError) -> JSONResponse:
        first = error.errors(include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        return _refusal(f"{param}: {first['msg']}", HTTPStatus.BAD_REQUEST, "BadRequestError", param or None)

    @app.exception_handler(HscrError)
    async def refused(_: Request, error: HscrError) -> JSONResponse:
        known = (_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)
        status, kind = next(known, (HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError"))
        return _refusal(str(error), status, kind)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return _refusal(error.detail, error.status_code, HTTPStatus(error.status_code).phrase)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        message = f"The engine failed: {type(error).__name__}. See its log."
        return _refusal(message, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")


def _refusal(message: str, status: int, kind: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(message, kind=kind, status=int(status), param=param), status_code=status)
