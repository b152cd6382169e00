"""POST /v1/feedback: a person accepts, corrects or rejects an answer."""

from fastapi import APIRouter

from hscr.errors import Gone, IdempotencyConflict, InvalidInput, InvalidQuestion, NotFound
from hscr.faults import fault_point
from hscr.records import Answer, AnswerKind, ApiKey, Feedback, Role, Verdict
from service.bodies import request_digest
from service.deps import Client, Gateway, IdempotencyKey
from service.docs import SENDING, problems
from service.limits import usable_text
from service.schemas import FeedbackBody
from service.security import require_visible

router = APIRouter(tags=["learning"])


@router.post(
    "/v1/feedback",
    operation_id="give_feedback",
    status_code=201,
    responses=problems(*SENDING, InvalidQuestion, NotFound, Gone, IdempotencyConflict),
)
async def give_feedback(
    state: Gateway, key: Client, body: FeedbackBody, idempotency_key: IdempotencyKey = None
) -> Feedback:
    """Judge an answer. Only a reviewer's judgement of an answer with consent can train.

    Research use only.
    """
    answer = await state.db(state.store.answers.get, body.answer_id)
    require_visible(key, answer)
    judgement = Feedback(
        answer_id=body.answer_id,
        verdict=body.verdict,
        correction=_correction(body, state.settings.max_question),
        comment=body.comment,
        key_id=key.id,
        trainable=_trainable(key, answer),
    )
    idempotency = (idempotency_key, request_digest(body)) if idempotency_key else None
    fault_point("feedback.given")
    kept = await state.db(state.store.answers.judge, judgement, idempotency=idempotency)
    fault_point("feedback.kept")
    return kept


def _correction(body: FeedbackBody, longest: int) -> str | None:
    if (body.verdict is Verdict.CORRECT) != (body.correction is not None):
        raise InvalidInput(
            "`correction` belongs to the verdict `correct`, and only to it.",
            remedy="Send the right answer with `correct`; leave it out otherwise.",
        )
    return None if body.correction is None else usable_text(body.correction, longest=longest)


def _trainable(key: ApiKey, answer: Answer) -> bool:
    """A conversation is no single question and answer, so nothing is trained on chats."""
    return key.role is Role.REVIEWER and answer.train_consent and answer.kind is not AnswerKind.CHAT
