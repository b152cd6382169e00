"""Preference records, and the jobs that make them."""

import hashlib
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Response

from hscr.errors import (
    ConsentMissing,
    Gone,
    IdempotencyConflict,
    ImageTooLarge,
    InvalidConfig,
    InvalidImage,
    InvalidInput,
    InvalidQuestion,
    Overloaded,
    UnsupportedImage,
)
from hscr.faults import fault_point
from hscr.imaging.decode import Prepared, prepare
from hscr.records import ApiKey, Job, JobKind, PreferenceSource, Role
from hscr.store.store import Store
from service.bodies import json_of
from service.deps import Gateway, IdempotencyKey, PageLimit, Reviewer
from service.docs import ALWAYS, SENDING, json_body, problems
from service.jobs import Submission, check_evaluation, check_generation
from service.limits import image_bytes, usable_text
from service.schemas import PreferenceJobBody, PreferencePage, Row
from service.security import project_of, require_role
from service.state import State
from workers.contract import GeneratePayload

router = APIRouter(tags=["learning"])

_UPLOADING = (InvalidImage, UnsupportedImage, ImageTooLarge, InvalidQuestion, Gone)


@router.get("/v1/preferences", operation_id="list_preferences", responses=problems(*ALWAYS))
async def list_preferences(
    *,
    state: Gateway,
    key: Reviewer,
    method: str | None = None,
    job_id: str | None = None,
    limit: PageLimit = 50,
    before: datetime | None = None,
) -> PreferencePage:
    """Preference records of the key's project, newest first. Research use only."""
    page = await state.db(
        state.store.preferences.page,
        method=method,
        job_id=job_id,
        project=project_of(key),
        limit=limit,
        before=before,
    )
    return PreferencePage(data=page, next_before=page[-1].created_at if len(page) == limit else None)


@router.post(
    "/v1/preference-jobs",
    operation_id="submit_preference_job",
    status_code=202,
    responses=problems(*SENDING, *_UPLOADING, ConsentMissing, InvalidConfig, IdempotencyConflict, Overloaded),
    openapi_extra=json_body(PreferenceJobBody),
)
async def submit_preference_job(
    state: Gateway,
    key: Reviewer,
    body: Annotated[PreferenceJobBody, Depends(json_of(PreferenceJobBody))],
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Make dispreferred answers for reviewers' right ones; 202 means the job survives any crash.

    Research use only.
    """
    _check(state, key, body)
    ids = body.source_ids if body.rows is None else await _uploaded(state, key, body.rows)
    payload = GeneratePayload(
        source_ids=None if ids is None else tuple(ids), config=body.config, then=body.then
    )
    asked = Submission(state, key, JobKind.GENERATE, response, body=body, idempotency_key=idempotency_key)
    return await asked.submitted(payload)


def _check(state: State, key: ApiKey, body: PreferenceJobBody) -> None:
    if body.rows is not None and body.source_ids is not None:
        raise InvalidInput("`rows` and `source_ids` exclude each other.", remedy="Send one of them.")
    if body.rows is not None and not body.consent:
        raise ConsentMissing(
            "Uploaded rows are trained on, and `consent` is not true.",
            remedy="Send `consent: true` if whoever owns the images and answers agreed.",
        )
    if len(body.rows or ()) > state.settings.max_rows:
        raise InvalidInput(
            f"There are more than {state.settings.max_rows} rows.", remedy="Split them over several jobs."
        )
    check_generation(body.config)
    if body.then is not None:
        require_role(key, Role.OPERATOR)
        check_evaluation(state, body.then.evaluate, auto_promote=body.then.auto_promote)


async def _uploaded(state: State, key: ApiKey, rows: list[Row]) -> list[str]:
    """Keep the rows' images and sources. All are checked before anything is kept."""
    read = [(_texts(state, row), await _prepared(state, row)) for row in rows]
    sources = [
        _source(key, question, answer, prepared, row.study)
        for row, ((question, answer), prepared) in zip(rows, read, strict=True)
    ]

    def put_images() -> None:
        for _, prepared in read:
            state.store.blobs.put(prepared.png)

    def keep(store: Store) -> None:
        put_images()  # before the transaction, which is to find it done
        fault_point("upload.images")
        store.answers.upload(sources, put_images=put_images)

    await state.db(keep, state.store)
    fault_point("upload.kept")
    return [source.id for source in sources]


def _texts(state: State, row: Row) -> tuple[str, str]:
    longest = state.settings.max_question
    return usable_text(row.question, longest=longest), usable_text(row.answer, longest=longest)


async def _prepared(state: State, row: Row) -> Prepared:
    data = await state.images(image_bytes, row.image)
    return await state.images(prepare, data, limits=state.settings.limits, secret=state.study_key)


def _source(
    key: ApiKey, question: str, answer: str, prepared: Prepared, study: str | None
) -> PreferenceSource:
    """The same row twice is one source, because its id is made of its content."""
    digest = prepared.image.digest
    told = hashlib.sha256("\0".join((key.project, digest, question, answer)).encode()).hexdigest()
    return PreferenceSource(
        id=f"row_{told[:32]}",
        image_digest=digest,
        study=study or prepared.study or f"study_{digest[:32]}",
        project=key.project,
        question=question,
        chosen=answer,
        consent=True,
    )
