"""POST /v1/vqa: a question about one image."""

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
from service.schemas import AnswerView, VqaBody

router = APIRouter(tags=["asking"])


@router.post(
    "/v1/vqa",
    operation_id="ask",
    response_model=AnswerView,
    responses={**answer_or_events(), **problems(*ASKING)},
    openapi_extra=upload_body(VqaBody),
)
async def ask(
    *,
    request: Request,
    state: Gateway,
    key: Client,
    stack: Admitted,
    upload: Annotated[Upload[VqaBody], Depends(upload_of(VqaBody))],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Answer a question about a PNG, JPEG or DICOM image. Research use only."""
    question = usable_text(upload.body.question, longest=state.settings.max_question)
    asked = Ask.of_upload(AnswerKind.VQA, key, Message(text=question), upload, idempotency_key)
    return await reply(state, request, asked, stack, stream=upload.body.stream)
