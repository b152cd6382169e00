"""POST /v1/chat/completions: OpenAI's chat protocol over one image."""

import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import format_sse_event

from hscr.engine import Message, Usage
from hscr.errors import InvalidInput, InvalidQuestion
from hscr.records import AnswerKind, ApiKey, Sampling, now
from service.answering import Ask, ClientGone, Finished, Making, answered, begun, while_connected
from service.bodies import json_of
from service.deps import Admitted, Client, Gateway
from service.docs import ASKING, chat_or_events, json_body, problems
from service.limits import image_bytes, usable_text
from service.replies import CLIENT_GONE, Events, Wire
from service.schemas import (
    ChatBody,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatReply,
    ChatUsage,
    ImagePart,
)
from service.state import State

router = APIRouter(tags=["asking"])


@router.post(
    "/v1/chat/completions",
    operation_id="chat",
    response_model=ChatCompletion,
    responses={**chat_or_events(), **problems(*ASKING)},
    openapi_extra=json_body(ChatBody),
)
async def chat(
    request: Request,
    state: Gateway,
    key: Client,
    stack: Admitted,
    body: Annotated[ChatBody, Depends(json_of(ChatBody))],
) -> Response:
    """Answer as OpenAI's API does, for its client libraries. Research use only."""
    asked = await _ask(state, key, body)
    try:
        if body.stream:
            making = await while_connected(state, request, begun(state, asked, stack))
            return Events(state, request, making.pieces(), _wire(making, body))
        finished = await while_connected(state, request, answered(state, asked, stack))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    return JSONResponse(_completion(finished).model_dump())


async def _ask(state: State, key: ApiKey, body: ChatBody) -> Ask:
    if len(body.messages) > state.settings.max_messages:
        raise InvalidInput(
            f"The conversation has more than {state.settings.max_messages} messages.",
            remedy="Leave out the oldest.",
        )
    if body.messages[-1].role != "user":
        raise InvalidQuestion("The last message is not the user's.", remedy="End with a user message.")
    messages = tuple(
        Message(role=message.role, text=usable_text(_text(message), longest=state.settings.max_question))
        for message in body.messages
    )
    return Ask(
        kind=AnswerKind.CHAT,
        key=key,
        messages=messages,
        data=await state.images(image_bytes, _image_url(body.messages)),
        sampling=_sampling(body),
        adapter=body.model,
        study=body.study,
    )


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content if not isinstance(part, ImagePart))


def _image_url(messages: list[ChatMessage]) -> str:
    images = [
        (message.role, part.image_url.url)
        for message in messages
        if isinstance(message.content, list)
        for part in message.content
        if isinstance(part, ImagePart)
    ]
    if len(images) != 1 or images[0][0] != "user":
        raise InvalidInput(
            f"The conversation carries {len(images)} images; it must carry one, in a user message.",
            remedy='Send one part {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}.',
        )
    return images[0][1]


def _sampling(body: ChatBody) -> Sampling:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    longest = body.max_completion_tokens or body.max_tokens or Sampling().max_tokens
    return Sampling(
        temperature=body.temperature, top_p=body.top_p, max_tokens=longest, seed=body.seed, stop=stop
    )


def _usage(usage: Usage) -> ChatUsage:
    total = usage.prompt_tokens + usage.completion_tokens
    return ChatUsage(**usage.model_dump(), total_tokens=total)


def _completion(finished: Finished) -> ChatCompletion:
    answer = finished.answer
    choice = ChatChoice(message=ChatReply(content=answer.text), finish_reason=answer.finish_reason)
    return ChatCompletion(
        id=answer.id,
        created=int(answer.created_at.timestamp()),
        model=finished.answer.provenance.adapter or finished.answer.provenance.model,
        choices=[choice],
        usage=_usage(finished.usage),
    )


def _wire(making: Making, body: ChatBody) -> Wire:
    """OpenAI's chunks, closed by `[DONE]` once the answer is kept."""
    fixed = {
        "id": making.ask.id,
        "object": "chat.completion.chunk",
        "created": int(now().timestamp()),
        "model": making.version or making.replica.model,
    }
    usage_wanted = body.stream_options is not None and body.stream_options.include_usage

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return format_sse_event(data_str=json.dumps({**fixed, "choices": choices, **more}))

    def delta(finish_reason: str | None = None, **changes: str) -> bytes:
        return chunk([{"index": 0, "delta": changes, "finish_reason": finish_reason}])

    def finished(end: Finished) -> bytes:
        usage = chunk([], usage=_usage(end.usage).model_dump()) if usage_wanted else b""
        return delta(end.answer.finish_reason) + usage + format_sse_event(data_str="[DONE]")

    return Wire(
        opening=delta(role="assistant", content=""),
        text=lambda text: delta(content=text),
        finished=finished,
        failed=lambda failure: format_sse_event(event="error", data_str=failure.model_dump_json()),
    )
