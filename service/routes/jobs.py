"""Jobs: their rows, their story as events, their end; and the operators' fine-tune."""

import asyncio
from collections.abc import AsyncIterable
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from hscr.errors import Conflict, Forbidden, IdempotencyConflict, InvalidConfig, NotFound
from hscr.records import Job, JobKind, JobState, Role
from service.deps import Client, Gateway, IdempotencyKey, Operator, PageLimit, Reviewer
from service.docs import ALWAYS, SENDING, problems
from service.jobs import Submission, check_evaluation
from service.schemas import JobPage
from service.security import require_role
from workers.contract import FinetunePayload

router = APIRouter(tags=["jobs"])

JobId = Annotated[str, Path(max_length=80, examples=["job_1"])]
LastEventId = Annotated[
    int, Header(ge=0, description="the last event seen; the story goes on after it", examples=[3])
]


@router.get("/v1/jobs", operation_id="list_jobs", responses=problems(*ALWAYS))
async def list_jobs(
    *,
    state: Gateway,
    _: Reviewer,
    kind: JobKind | None = None,
    job_state: Annotated[JobState | None, Query(alias="state")] = None,
    parent: str | None = None,
    limit: PageLimit = 50,
    before: datetime | None = None,
) -> JobPage:
    """Jobs, newest first. Research use only."""
    page = await state.db(
        state.store.jobs.page, kind=kind, state=job_state, parent=parent, limit=limit, before=before
    )
    return JobPage(data=page, next_before=page[-1].created_at if len(page) == limit else None)


async def _job(state: Gateway, key: Client, job_id: JobId) -> Job:
    """Reviewers see every job, a client those of its own key."""
    try:
        job = await state.db(state.store.jobs.get, job_id)
    except NotFound:
        require_role(key, Role.REVIEWER)
        raise
    if job.key_id != key.id:
        require_role(key, Role.REVIEWER)
    return job


Named = Annotated[Job, Depends(_job)]


@router.get("/v1/jobs/{job_id}", operation_id="get_job", responses=problems(*ALWAYS, NotFound))
async def get_job(job: Named) -> Job:
    """One job: its state, its settings, and its result or error. Research use only."""
    return job


@router.get(
    "/v1/jobs/{job_id}/events",
    operation_id="follow_job",
    response_class=EventSourceResponse,
    responses=problems(*ALWAYS, NotFound),
)
async def follow_job(
    state: Gateway, job: Named, last_event_id: LastEventId = 0
) -> AsyncIterable[ServerSentEvent]:
    """The job's story as server-sent events, from its beginning or after Last-Event-ID, to its end.

    Research use only.
    """
    seen = last_event_id
    while True:
        # The state is read before the events, so that a final state's own event is always among them.
        ended = (await state.db(state.store.jobs.get, job.id)).state.final
        events = await state.db(state.store.jobs.events, job.id, after=seen)
        for event in events:
            seen = event.seq
            yield ServerSentEvent(data=event, event=event.type, id=str(event.seq))
        if (ended or state.leaving.begun) and not events:
            return  # who follows a job that goes on asks another copy, by Last-Event-ID
        if not events:
            await asyncio.sleep(state.settings.event_poll)


@router.delete(
    "/v1/jobs/{job_id}", operation_id="cancel_job", responses=problems(*ALWAYS, NotFound, Conflict)
)
async def cancel_job(state: Gateway, key: Reviewer, job: Named) -> Job:
    """Stop a job: a queued one at once, a running one within seconds. Research use only."""
    if key.role is not Role.OPERATOR and job.key_id != key.id:
        raise Forbidden("Another key submitted this job.", remedy="Ask an operator to cancel it.")
    return await state.db(state.store.jobs.cancel, job.id)


@router.post(
    "/v1/jobs/{job_id}/retry",
    operation_id="retry_job",
    status_code=202,
    responses=problems(*ALWAYS, NotFound, Conflict),
)
async def retry_job(state: Gateway, key: Reviewer, job: Named, response: Response) -> Job:
    """Submit a failed or cancelled job again, as a new one; asked twice, it is the same new one.

    Research use only.
    """
    if key.role is not Role.OPERATOR and job.key_id != key.id:
        raise Forbidden("Another key submitted this job.", remedy="Ask an operator to submit it again.")
    again = await state.db(state.store.jobs.retry, job.id, key_id=key.id)
    response.headers["Location"] = f"/v1/jobs/{again.id}"
    return again


@router.post(
    "/v1/finetune-jobs",
    operation_id="submit_finetune_job",
    status_code=202,
    responses=problems(*SENDING, InvalidConfig, IdempotencyConflict),
)
async def submit_finetune_job(
    state: Gateway,
    key: Operator,
    body: FinetunePayload,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Train an adapter from the base model on all live consented records. Research use only."""
    check_evaluation(state, body.evaluate, auto_promote=body.auto_promote)
    asked = Submission(state, key, JobKind.FINETUNE, response, body=body, idempotency_key=idempotency_key)
    return await asked.submitted(body)
