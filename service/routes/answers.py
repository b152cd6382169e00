"""Kept answers, and where each came from."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path

from hscr.errors import Gone, NotFound
from hscr.records import Answer, ApiKey
from hscr.store.store import Store
from service.deps import Client, Gateway, PageLimit
from service.docs import ALWAYS, problems
from service.schemas import AnswerPage, AnswerView, Lineage, PointerChange
from service.security import project_of, require_visible
from service.state import State

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
