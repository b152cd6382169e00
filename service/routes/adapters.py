"""Trained versions, and the ways to change which one serves."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Path, Response

from hscr.errors import Conflict, EngineUnavailable, GateRefused, IdempotencyConflict, NotFound
from hscr.faults import fault_point
from hscr.records import AdapterState, AdapterVersion, Evaluation, GateVerdict, Job, JobKind, Pointer, Replica
from hscr.store.releases import BASE
from hscr.store.store import Store
from service.bodies import request_digest
from service.deps import Gateway, IdempotencyKey, Operator, Reviewer
from service.docs import ALWAYS, SENDING, problems
from service.jobs import Submission
from service.schemas import AdapterList, AdapterView, CanaryBody, PromoteBody, RollbackBody
from service.state import State
from workers.contract import ReleasePayload

router = APIRouter(tags=["adapters"])

Version = Annotated[
    str, Path(max_length=120, description="an adapter's name, or `base`", examples=["hscr@3f9c2a7b1d4e"])
]


@router.get("/v1/adapters", operation_id="list_adapters", responses=problems(*ALWAYS))
async def list_adapters(state: Gateway, _: Reviewer) -> AdapterList:
    """Trained versions, newest first, the pointer, and how a canary does. Research use only."""
    return await state.db(_standing, state, state.store)


@router.post(
    "/v1/adapters/{version}/promote",
    operation_id="promote",
    status_code=202,
    responses=problems(*SENDING, NotFound, Conflict, GateRefused, IdempotencyConflict),
)
async def promote(
    *,
    state: Gateway,
    key: Operator,
    version: Version,
    body: PromoteBody,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Release a version that passed the gate, or that the caller overrides by name and reason.

    Research use only.
    """
    asked = Submission(
        state, key, JobKind.RELEASE, response, body=body, about=version, idempotency_key=idempotency_key
    )
    if earlier := await asked.repeated():
        return earlier
    name = None if version == BASE else version
    passed = await state.db(_admissible, state.store, name, body)
    payload = ReleasePayload(
        version_name=name, evaluation_id=passed, actor=key.id, reason=body.reason, override=body.override
    )
    return await asked.submitted(payload)


@router.post(
    "/v1/adapters/{version}/canary",
    operation_id="start_canary",
    status_code=202,
    responses=problems(*SENDING, NotFound, Conflict, GateRefused, IdempotencyConflict),
)
async def start_canary(
    *,
    state: Gateway,
    key: Operator,
    version: Version,
    body: CanaryBody,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Let a version answer a share of the traffic first; the terms are those of a promotion.

    While it runs, its errors and times to first text are compared with the active version's; when they are
    worse, the share goes back to 0 by itself, on record. Research use only.
    """
    if version == BASE:
        raise Conflict("The base model cannot be a candidate.", remedy="Promote it, or name an adapter.")
    asked = Submission(
        state, key, JobKind.RELEASE, response, body=body, about=version, idempotency_key=idempotency_key
    )
    if earlier := await asked.repeated():
        return earlier
    passed = await state.db(_admissible, state.store, version, body)
    payload = ReleasePayload(
        version_name=version, evaluation_id=passed, actor=key.id, reason=body.reason, override=body.override,
        share=body.share,
    )  # fmt: skip
    return await asked.submitted(payload)


@router.post("/v1/adapters/end-canary", operation_id="end_canary", responses=problems(*SENDING, Conflict))
async def end_canary(state: Gateway, key: Operator, body: RollbackBody) -> Pointer:
    """All traffic to the active version again; the candidate stays loaded. Research use only."""
    return await state.db(state.store.releases.end_canary, actor=key.id, reason=body.reason)


@router.post(
    "/v1/adapters/rollback",
    operation_id="rollback",
    responses=problems(*SENDING, Conflict, EngineUnavailable, IdempotencyConflict),
)
async def rollback(
    state: Gateway, key: Operator, body: RollbackBody, idempotency_key: IdempotencyKey = None
) -> Pointer:
    """Serve the previous version again, from the next request on. Research use only."""
    previous = state.pointer.pointer.previous
    if previous is not None and not state.engines.serving(previous):
        raise Conflict(
            f"No replica has {previous} loaded any more.", remedy="Promote it, so that it is loaded first."
        )
    fault_point("rollback.asked")
    moved = await state.db(
        state.store.releases.rollback,
        actor=key.id,
        reason=body.reason,
        idempotency=(idempotency_key, request_digest(body)) if idempotency_key else None,
    )
    fault_point("rollback.done")
    return moved


def _standing(state: State, store: Store) -> AdapterList:
    seen = timedelta(seconds=state.settings.replicas_seen)
    releases = store.releases
    pointer, replicas = releases.pointer(), releases.replicas(seen_within=seen)
    views = [_view(adapter, pointer, replicas) for adapter in releases.adapters()]
    canary = releases.canary_counts(pointer.epoch) if pointer.share else {}
    return AdapterList(data=views, pointer=pointer, canary=canary)


def _view(adapter: AdapterVersion, pointer: Pointer, replicas: list[Replica]) -> AdapterView:
    return AdapterView(
        **dict(adapter),
        active=adapter.name == pointer.active,
        previous=adapter.name == pointer.previous,
        candidate=adapter.name == pointer.candidate,
        loaded_on=[replica.id for replica in replicas if adapter.name in replica.loaded],
    )


def _admissible(store: Store, version: str | None, body: PromoteBody) -> str | None:
    """The evaluation that lets a version serve; None for the base model or an override without one.

    Refuses at once what the release job would refuse later. Raises NotFound, Conflict, GateRefused.
    """
    if version == store.releases.pointer().active:
        raise Conflict(f"{version or 'The base model'} is already active.", remedy="Nothing has to be done.")
    if version is None:
        return None
    if store.releases.adapter(version).state is AdapterState.REFUSED:
        raise Conflict(
            f"{version} was refused as unsafe to load.", remedy="Train again; see its job's error."
        )
    judged = _judged(store, version, body.evaluation_id)
    if not body.override and (judged is None or judged.verdict is not GateVerdict.PASS):
        raise GateRefused(
            f"{version} has no passed evaluation (verdict: {judged.verdict if judged else 'none'}).",
            remedy="Evaluate it, or promote with `override: true` and a reason; your key goes on record.",
        )
    return None if judged is None else judged.id


def _judged(store: Store, version: str, evaluation_id: str | None) -> Evaluation | None:
    """The named evaluation of this version, or its newest."""
    if evaluation_id is None:
        return next(iter(store.releases.evaluations(candidate=version, limit=1)), None)
    named = store.releases.evaluation(evaluation_id)
    if named.candidate != version:
        raise Conflict(
            f"{evaluation_id} judged another version.", remedy="Leave it out: the newest one counts."
        )
    return named
