"""Evaluations: what the gate said of a version, and asking it again."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from hscr.errors import IdempotencyConflict, InvalidConfig, NotFound
from hscr.records import Evaluation, Job, JobKind
from service.deps import Gateway, IdempotencyKey, Operator, PageLimit, Reviewer
from service.docs import ALWAYS, SENDING, problems
from service.jobs import Submission, check_evaluation
from service.schemas import EvaluationJobBody, EvaluationList, Outcomes
from workers.contract import ScorePayload

router = APIRouter(tags=["evaluations"])

EvaluationId = Annotated[str, Path(max_length=80, examples=["eval_1"])]


@router.get("/v1/evaluations", operation_id="list_evaluations", responses=problems(*ALWAYS))
async def list_evaluations(
    state: Gateway, _: Reviewer, candidate: str | None = None, limit: PageLimit = 50
) -> EvaluationList:
    """Evaluations, newest first. Research use only."""
    found = await state.db(state.store.releases.evaluations, candidate=candidate, limit=limit)
    return EvaluationList(data=found)


@router.get(
    "/v1/evaluations/{evaluation_id}",
    operation_id="get_evaluation",
    responses=problems(*ALWAYS, NotFound),
)
async def get_evaluation(state: Gateway, _: Reviewer, evaluation_id: EvaluationId) -> Evaluation:
    """One evaluation: scores, differences with their intervals, verdict and reasons. Research use only."""
    return await state.db(state.store.releases.evaluation, evaluation_id)


@router.get(
    "/v1/evaluations/{evaluation_id}/outcomes",
    operation_id="get_evaluation_outcomes",
    responses=problems(*ALWAYS, NotFound),
)
async def get_evaluation_outcomes(state: Gateway, _: Reviewer, evaluation_id: EvaluationId) -> Outcomes:
    """Every scored answer behind an evaluation, for paired comparisons. Research use only."""
    await state.db(state.store.releases.evaluation, evaluation_id)
    found = await state.db(state.store.releases.outcomes, evaluation_id)
    return Outcomes.model_validate(found)


@router.post(
    "/v1/evaluations",
    operation_id="submit_evaluation",
    status_code=202,
    responses=problems(*SENDING, NotFound, InvalidConfig, IdempotencyConflict),
)
async def submit_evaluation(
    state: Gateway,
    key: Operator,
    body: EvaluationJobBody,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Score a version's visual dependence, then judge it against the active one. Research use only."""
    await state.db(state.store.releases.adapter, body.adapter)
    check_evaluation(state, body.config, auto_promote=body.auto_promote)
    payload = ScorePayload(candidate=body.adapter, evaluate=body.config, auto_promote=body.auto_promote)
    asked = Submission(state, key, JobKind.SCORE, response, body=body, idempotency_key=idempotency_key)
    return await asked.submitted(payload)
