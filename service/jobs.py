"""Making a request into a durable job, and what a request may ask a job to do."""

from fastapi import Response
from pydantic import BaseModel

from hscr.config import EvaluateConfig, GenerateConfig, RerankConfig
from hscr.errors import Forbidden, InvalidConfig
from hscr.faults import fault_point
from hscr.records import ApiKey, Job, JobKind
from service.bodies import request_digest
from service.state import State
from workers.contract import Payload


async def submitted(
    state: State,
    key: ApiKey,
    kind: JobKind,
    payload: Payload,
    response: Response,
    *,
    body: BaseModel,
    about: str = "",
    idempotency_key: str | None = None,
) -> Job:
    """The job, durable by now; the one that the same Idempotency-Key made before, if there is one.

    `body` and `about` (what the path names) are the request's identity. Sets the response's Location.
    """
    job = Job(kind=kind, payload=payload.stored(), key_id=key.id)
    idempotency = _identity(kind, body, about, idempotency_key)
    fault_point("job.asked")
    job = await state.db(state.store.jobs.submit, job, idempotency=idempotency)
    fault_point("job.submitted", kind)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


async def repeated(
    state: State,
    key: ApiKey,
    kind: JobKind,
    response: Response,
    *,
    body: BaseModel,
    about: str = "",
    idempotency_key: str | None = None,
) -> Job | None:
    """The job that the same Idempotency-Key made before.

    For routes that refuse what is no longer possible: it may have become so by that very job.
    """
    identity = _identity(kind, body, about, idempotency_key)
    if identity is None:
        return None
    job = await state.db(state.store.jobs.repeated, key.id, *identity)
    if job is not None:
        response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


def _identity(
    kind: JobKind, body: BaseModel, about: str, idempotency_key: str | None
) -> tuple[str, str] | None:
    return (idempotency_key, request_digest(body, kind, about)) if idempotency_key else None


def check_generation(config: GenerateConfig) -> None:
    """Raises InvalidConfig for an embedder in a folder: a client names no path on our machines."""
    packaged = RerankConfig().embedder
    if config.rerank.embedder != packaged:
        raise InvalidConfig("`rerank.embedder` names none of this gateway's.", remedy=f"Use {packaged}.")


def check_evaluation(state: State, config: EvaluateConfig | None, *, auto_promote: bool) -> None:
    """Raises InvalidConfig for a suite that is not listed, Forbidden for promotion without a person."""
    if config is not None and config.suite not in state.settings.suites:
        raise InvalidConfig(
            "`suite` names none of this gateway's suites.", remedy=f"Use {', '.join(state.settings.suites)}."
        )
    if auto_promote and not state.settings.auto_promote:
        raise Forbidden(
            "Promotion without a person is switched off here.",
            remedy="Leave `auto_promote` out and promote after reading the evaluation.",
        )
