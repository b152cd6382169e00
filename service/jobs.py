"""Making a request into a durable job, and what a request may ask a job to do."""

from fastapi import Response
from pydantic import BaseModel

from hscr.config import EvaluateConfig, GenerateConfig, RerankConfig
from hscr.errors import Forbidden, InvalidConfig
from hscr.faults import fault_point
from hscr.records import ApiKey, Job, JobKind
from hscr.store.jobs import Asked
from service.bodies import request_digest
from service.state import State
from workers.contract import Payload


class Submission:
    """A request for a job. `body` and `about` (what the path names) are its identity.

    Both ways to its job set the response's Location.
    """

    def __init__(
        self,
        state: State,
        key: ApiKey,
        kind: JobKind,
        response: Response,
        *,
        body: BaseModel,
        about: str = "",
        idempotency_key: str | None = None,
    ) -> None:
        self._state, self._key, self._kind, self._response = state, key, kind, response
        self._identity = (idempotency_key, request_digest(body, kind, about)) if idempotency_key else None

    async def submitted(self, payload: Payload) -> Job:
        """The job, durable by now; the one that the same Idempotency-Key made before, if there is one."""
        job = Job(kind=self._kind, payload=payload.stored(), key_id=self._key.id)
        fault_point("job.asked")
        job = await self._state.submit(Asked(job, self._identity))
        fault_point("job.submitted", self._kind)
        return self._located(job)

    async def repeated(self) -> Job | None:
        """The job that the same Idempotency-Key made before.

        For routes that refuse what is no longer possible: it may have become so by that very job.
        """
        if self._identity is None:
            return None
        job = await self._state.db(self._state.store.jobs.repeated, self._key.id, *self._identity)
        return None if job is None else self._located(job)

    def _located(self, job: Job) -> Job:
        self._response.headers["Location"] = f"/v1/jobs/{job.id}"
        return job


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
