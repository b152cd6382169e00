"""Kept answers, and where each came from."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import JSONResponse

from hscr.errors import Conflict, Gone, IdempotencyConflict, InvalidConfig, NotFound
from hscr.records import Answer, ApiKey, Dropping, Job, JobKind
from hscr.store.store import Store
from service.deps import Client, Gateway, IdempotencyKey, PageLimit
from service.docs import ALWAYS, SENDING, problems
from service.jobs import Submission
from service.schemas import (
    AnswerPage,
    AnswerView,
    DependenceBody,
    DependenceView,
    Lineage,
    PointerChange,
)
from service.security import project_of, require_visible
from service.state import State
from workers.contract import ScoreAnswerPayload

router = APIRouter(tags=["answers"])

AnswerId = Annotated[str, Path(max_length=80, examples=["ans_1"])]

_HISTORY = 1000


@router.get("/v1/answers", operation_id="list_answers", responses=problems(*ALWAYS))
async def list_answers(
    state: Gateway, key: Client, limit: PageLimit = 50, before: datetime | None = None
) -> AnswerPage:
    """Answers of the key's project, newest first. Research use only."""
    page = await state.db(state.store.answers.page, project=project_of(key), limit=limit, before=before)
    more = page[-1].created_at if len(page) == limit else None
    return AnswerPage(data=[AnswerView.of(answer) for answer in page], next_before=more)


@router.get("/v1/answers/{answer_id}", operation_id="get_answer", responses=problems(*ALWAYS, NotFound, Gone))
async def get_answer(state: Gateway, key: Client, answer_id: AnswerId) -> AnswerView:
    """One answer with its provenance. Research use only."""
    return AnswerView.of(await _visible(state, key, answer_id))


@router.get(
    "/v1/answers/{answer_id}/lineage",
    operation_id="get_lineage",
    responses=problems(*ALWAYS, NotFound, Gone),
)
async def get_lineage(state: Gateway, key: Client, answer_id: AnswerId) -> Lineage:
    """From the image over the adapter's training, judgement and promotion to what the answer trained."""
    answer = await _visible(state, key, answer_id)
    return await state.db(_lineage, state.store, answer)


@router.post(
    "/v1/answers/{answer_id}/visual-dependence",
    operation_id="score_answer",
    status_code=202,
    response_model=Job,
    responses={
        200: {"model": DependenceView, "description": "It was scored before under the same settings"},
        **problems(*SENDING, NotFound, Gone, Conflict, InvalidConfig, IdempotencyConflict),
    },
)
async def score_answer(
    *,
    state: Gateway,
    key: Client,
    answer_id: AnswerId,
    body: DependenceBody = DependenceBody(),
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job | JSONResponse:
    """Measure how much the image changed each word, by the version that answered; GET here has the result.

    Scored is log p(token | image) - log p(token | image with 70 % of its visual tokens dropped), averaged
    over 8 masks that are fixed by the image. It says how much the image changed a word; it is no explanation.
    Gone when the image has expired or its study was deleted. Research use only.
    """
    answer = await _visible(state, key, answer_id)
    dropping = _dropping(body)
    asked = Submission(
        state, key, JobKind.SCORE_ANSWER, response,
        body=body, about=answer.id, idempotency_key=idempotency_key,
    )  # fmt: skip
    if earlier := await asked.repeated():
        return earlier  # also when its job has scored the answer by now
    if found := await state.db(state.store.answers.dependence, answer.id, dropping):
        return JSONResponse(DependenceView.of(found).model_dump(mode="json"))
    _require_scorable(answer)
    await state.db(state.store.answers.require_image, answer)
    payload = ScoreAnswerPayload(answer_id=answer.id, dropping=dropping)
    return await asked.submitted(payload)


@router.get(
    "/v1/answers/{answer_id}/visual-dependence",
    operation_id="get_visual_dependence",
    responses=problems(*ALWAYS, NotFound, Gone),
)
async def get_visual_dependence(state: Gateway, key: Client, answer_id: AnswerId) -> DependenceView:
    """How much the image changed each word of the answer, in nats; no explanation. Research use only."""
    answer = await _visible(state, key, answer_id)
    found = await state.db(state.store.answers.dependence, answer.id)
    if found is None:
        raise NotFound(
            "This answer has not been scored yet.", remedy="POST here, and wait for the job's end."
        )
    return DependenceView.of(found)


def _dropping(body: DependenceBody) -> Dropping:
    if body.mode == "delete":
        raise InvalidConfig(
            "`mode` is `delete`, and engines make no promise about fewer visual tokens than an image has.",
            remedy="Use `zero`, which empties them in their places.",
        )
    return Dropping(mode=body.mode)


def _require_scorable(answer: Answer) -> None:
    if answer.conversation:
        raise Conflict(
            "The answer belongs to a conversation of several turns, which is kept as one text.",
            remedy="Ask the last question on its own, and have that answer scored.",
        )
    if not answer.text.strip():
        raise Conflict("The answer says nothing, so nothing of it can be scored.", remedy="Ask again.")


async def _visible(state: State, key: ApiKey, answer_id: str) -> Answer:
    answer = await state.db(state.store.answers.get, answer_id)
    require_visible(key, answer)
    return answer


def _lineage(store: Store, answer: Answer) -> Lineage:
    version = answer.provenance.adapter
    given = store.answers.feedback(answer.id)
    made = [record.id for each in given for record in store.preferences.of_source(each.id)]
    used = {name for each in given for name in store.releases.adapters_trained_on_source(each.id)}
    return Lineage(
        answer=AnswerView.of(answer),
        image=answer.image,
        image_stored=store.blobs.exists(answer.image.digest),
        adapter=None if version is None else store.releases.adapter(version),
        trained_on=[] if version is None else store.releases.trained_on(version),
        evaluations=[] if version is None else store.releases.evaluations(candidate=version),
        promotions=[] if version is None else _promotions(store, version),
        visual_dependence=store.answers.dependence(answer.id),
        feedback=given,
        preferences=made,
        used_by=sorted(used),
    )


_SERVES = {"promote": "active", "rollback": "active", "canary": "candidate"}
"""Whom each action of the pointer's history made answer questions."""


def _promotions(store: Store, version: str) -> list[PointerChange]:
    """The changes that made the version answer questions."""
    changes = store.releases.history(limit=_HISTORY)
    serving = [c for c in changes if c["action"] in _SERVES and c["body"][_SERVES[c["action"]]] == version]
    return [PointerChange.model_validate(change) for change in serving]
