"""GET /v1/models: what a request may name as its model or adapter."""

from fastapi import APIRouter

from hscr.records import Pointer
from service.deps import Client, Gateway
from service.docs import ALWAYS, problems
from service.engines import EnginePool
from service.schemas import ModelList, ModelView

router = APIRouter(tags=["asking"])


@router.get("/v1/models", operation_id="list_models", responses=problems(*ALWAYS))
async def list_models(state: Gateway, _: Client) -> ModelList:
    """The base model and the versions kept loaded, with the intended use their card states.

    Research use only.
    """
    pointer = state.pointer.pointer
    named = dict.fromkeys([None, pointer.active, pointer.previous, pointer.candidate])
    views = [_view(state.engines, pointer, version) for version in named]
    return ModelList(data=[view for view in views if view is not None])


def _view(engines: EnginePool, pointer: Pointer, version: str | None) -> ModelView | None:
    serving = engines.serving(version)
    if not serving:
        return None
    model = serving[0].model
    return ModelView(
        id=version or model,
        created=0,
        parent=None if version is None else model,
        active=version == pointer.active,
        previous=version == pointer.previous and version != pointer.active,
        candidate=version is not None and version == pointer.candidate,
        replicas=len(serving),
        intended_use=serving[0].intended_use,
    )
