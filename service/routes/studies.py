"""DELETE /v1/studies/{study}: forget an examination."""

from typing import Annotated

from fastapi import APIRouter, Path

from hscr.errors import NotFound
from hscr.faults import fault_point
from hscr.records import Tombstone
from hscr.store.store import Store
from service.deps import Gateway, Operator
from service.docs import ALWAYS, problems
from service.schemas import StudyDeletion

router = APIRouter(tags=["studies"])


@router.delete("/v1/studies/{study}", operation_id="delete_study", responses=problems(*ALWAYS))
async def delete_study(
    state: Gateway, key: Operator, study: Annotated[str, Path(max_length=100, examples=["study_1"])]
) -> StudyDeletion:
    """Delete a study's images and records for good, and name the adapters that were trained on it.

    No new material is taken under its name: 410. Research use only.
    """
    return await state.db(_delete, state.store, study, key.id)


@router.get("/v1/studies/{study}", operation_id="get_tombstone", responses=problems(*ALWAYS, NotFound))
async def get_tombstone(
    state: Gateway, _: Operator, study: Annotated[str, Path(max_length=100, examples=["study_1"])]
) -> Tombstone:
    """Who deleted a study, when, and which adapters were trained on it. Research use only."""
    return await state.db(state.store.preferences.tombstone, study)


def _delete(store: Store, study: str, actor: str) -> StudyDeletion:
    adapters, images = store.preferences.delete_study(study, actor)
    fault_point("study.deleted")
    dropped = store.images.drop_unheld(images)
    fault_point("study.gone")
    return StudyDeletion(study=study, images_deleted=len(dropped), adapters_trained_on_it=adapters)
