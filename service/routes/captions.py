"""POST /v1/captions: a description of one image."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from hscr.engine import Message
from hscr.records import AnswerKind
from service.answering import Ask
from service.bodies import Upload, upload_of
from service.deps import Admitted, Client, Gateway, IdempotencyKey
from service.docs import ASKING, answer_or_events, problems, upload_body
from service.limits import usable_text
from service.replies import reply
from service.schemas import AnswerView, CaptionBody

router = APIRouter(tags=["asking"])


@router.post(
    "/v1/captions",
    operation_id="caption",
    response_model=AnswerView,
    responses={**answer_or_events(), **problems(*ASKING)},
    openapi_extra=upload_body(CaptionBody),
)
async def caption(
    *,
    request: Request,
    state: Gateway,
    key: Client,
    stack: Admitted,
    upload: Annotated[Upload[CaptionBody], Depends(upload_of(CaptionBody))],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Describe a PNG, JPEG or DICOM image. Research use only."""
    wanted = state.settings.caption_prompt if upload.body.prompt is None else upload.body.prompt
    prompt = usable_text(wanted, longest=state.settings.max_question)
    asked = Ask.of_upload(AnswerKind.CAPTION, key, Message(text=prompt), upload, idempotency_key)
    return await reply(state, request, asked, stack, stream=upload.body.stream)
