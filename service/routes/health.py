"""Whether this copy lives and may be sent traffic, its metrics, and what each problem type means."""

from typing import Annotated

from fastapi import APIRouter, Path, Response
from prometheus_client import CONTENT_TYPE_LATEST

from hscr.errors import EngineUnavailable, InvalidInput, NotFound, StoreFull, StoreReadOnly
from hscr.store.releases import BASE
from service.deps import Gateway
from service.docs import problems
from service.errors import CopyLeaving, InternalError, known_problems, status_of
from service.pointer import PointerStale
from service.schemas import Health, ProblemDescription, Readiness

router = APIRouter(tags=["health"])


@router.get("/livez", operation_id="livez", responses=problems(InternalError))
async def livez() -> Health:
    """The process answers. Research use only."""
    return Health()


@router.get(
    "/readyz",
    operation_id="readyz",
    responses=problems(CopyLeaving, PointerStale, StoreFull, StoreReadOnly, EngineUnavailable, InternalError),
)
async def readyz(state: Gateway) -> Readiness:
    """The store takes answers, the pointer is fresh, a replica serves it, and nobody asked this copy to stop.

    Research use only.
    """
    if state.leaving.begun:
        raise CopyLeaving(
            "This copy of the gateway was asked to stop.", remedy="Ask another copy, or the same one later."
        )
    state.pointer.require_fresh()
    pointer = state.pointer.pointer
    serving = state.engines.serving(pointer.active)
    if not serving:
        raise EngineUnavailable(
            f"No ready replica serves {pointer.active or 'the base model'}.",
            remedy="Start an engine with its agent; `hscr status` shows what keeps them.",
        )
    return Readiness(epoch=pointer.epoch, active=pointer.active or BASE, replicas=len(serving))


@router.get(
    "/metrics",
    operation_id="metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus text format",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        **problems(InternalError),
    },
)
async def metrics(state: Gateway) -> Response:
    """Counts and times; no label says anything about a patient. Research use only."""
    await state.findings.look()
    return Response(state.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get(
    "/problems/{slug}",
    operation_id="explain_problem",
    responses=problems(NotFound, InvalidInput, InternalError),
)
async def explain_problem(slug: Annotated[str, Path(max_length=60)]) -> ProblemDescription:
    """What a problem's `type` means. Research use only."""
    kind = known_problems().get(slug)
    if kind is None:
        raise NotFound("There is no such problem type.", remedy="/openapi.json lists each route's problems.")
    return ProblemDescription(
        type=f"/problems/{slug}",
        title=kind.title,
        status=status_of(kind),
        description=(kind.__doc__ or kind.title).strip(),
    )
