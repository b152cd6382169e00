"""The gateway's API from Python: what the `hscr` command and the demo use.

Answers come as the domain's own records; a problem (RFC 9457) comes as the HscrError it names. Nothing is
retried except the following of a job, which resumes where it broke off.
"""

import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

from hscr.config import EvaluateConfig, FinetuneConfig, GenerateConfig
from hscr.errors import EngineInterrupted
from hscr.evaluate.outcome import Outcome
from hscr.gateway_http import GatewayUnreachable, Http, known, stated
from hscr.probes import http_ok
from hscr.records import (
    AdapterVersion,
    Answer,
    Evaluation,
    Feedback,
    Job,
    JobEvent,
    JobState,
    Pointer,
    PreferenceRecord,
    Record,
    Sampling,
    Tombstone,
    Verdict,
    VersionCounts,
    VisualDependence,
)

DEFAULT_URL = "http://127.0.0.1:8080"
OUTAGE_SECONDS = 60.0
"""How long `follow` waits for a gateway that went away."""

_CANCELLED = {"slug": "job-cancelled", "detail": "The job was cancelled.", "remedy": ""}

R = TypeVar("R", bound=Record)


class Upload(NamedTuple):
    """An image file's bytes, a question about it, and the answer known to be right."""

    image: bytes
    question: str
    answer: str
    study: str | None = None


class Client:
    """One connection pool to one gateway. `timeout` bounds the silence between two reads, in seconds.

    Every method may raise the HscrError that the gateway states, or HscrError when none answers.
    """

    def __init__(self, url: str = DEFAULT_URL, key: str | None = None, *, timeout: float = 130.0) -> None:
        self.url = url.rstrip("/")
        self._http = Http(url, key, timeout=timeout)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- asking --------------------------------------------------------------------------------------------

    def ask(self, image: bytes, question: str, **options: Any) -> Answer:
        """`options`: adapter, sampling, study, frame, window, as POST /v1/vqa takes them."""
        return _record(Answer, self._http.post("/v1/vqa", _asked(image, question=question, **options)))

    def caption(self, image: bytes, **options: Any) -> Answer:
        """`options`: as for `ask`, and prompt."""
        return _record(Answer, self._http.post("/v1/captions", _asked(image, **options)))

    def ask_stream(self, image: bytes, question: str, **options: Any) -> Iterator[str | Answer]:
        """Pieces of the answer as they are made, and at the end the kept answer itself.

        Raises EngineInterrupted when the stream breaks off.
        """
        body = _asked(image, question=question, stream=True, **options)
        for event in self._http.events("POST", "/v1/vqa", json=body):
            if event.name == "delta":
                yield str(event.data["text"])
            elif event.name == "answer":
                yield _record(Answer, event.data)
                return
            elif event.name == "error":
                raise stated(event.data)
        raise EngineInterrupted("The stream ended before the answer was complete.", remedy="Ask again.")

    def answers(self, *, limit: int = 50) -> list[Answer]:
        return _records(Answer, self._http.get("/v1/answers", limit=limit)["data"])

    def answer(self, answer_id: str) -> Answer:
        return _record(Answer, self._http.get(f"/v1/answers/{answer_id}"))

    def lineage(self, answer_id: str) -> dict[str, Any]:
        """Image, adapter, training records, evaluations and promotions behind an answer."""
        return self._http.get(f"/v1/answers/{answer_id}/lineage")

    def score_answer(self, answer_id: str) -> Job | VisualDependence:
        """Have it measured how much the image changed an answer's words. An earlier result comes at once."""
        body = self._http.post(f"/v1/answers/{answer_id}/visual-dependence", {})
        return _record(Job, body) if "kind" in body else _record(VisualDependence, body)

    def visual_dependence(self, answer_id: str) -> VisualDependence:
        """The newest result. Raises NotFound before there is one."""
        return _record(VisualDependence, self._http.get(f"/v1/answers/{answer_id}/visual-dependence"))

    def models(self) -> list[dict[str, Any]]:
        """Names that a question may use now."""
        return list(self._http.get("/v1/models")["data"])

    # -- judging and learning ------------------------------------------------------------------------------

    def feedback(
        self, answer_id: str, verdict: Verdict, *, correction: str | None = None, comment: str | None = None
    ) -> Feedback:
        body = {"answer_id": answer_id, "verdict": verdict, "correction": correction, "comment": comment}
        return _record(Feedback, self._http.post("/v1/feedback", body))

    def generate(
        self,
        config: GenerateConfig | None = None,
        *,
        rows: Sequence[Upload] | None = None,
        source_ids: Sequence[str] | None = None,
        consent: bool = False,
        then: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Make dispreferred answers from `rows`, from named sources, or from all pending feedback.

        `then` is the fine-tune that follows, as `finetune_body` makes it.
        """
        body: dict[str, Any] = {"config": (config or GenerateConfig()).resolved(), "consent": consent}
        if rows is not None:
            body["rows"] = [{**row._asdict(), "image": _base64(row.image)} for row in rows]
        if source_ids is not None:
            body["source_ids"] = list(source_ids)
        if then is not None:
            body["then"] = dict(then)
        return _record(Job, self._http.post("/v1/preference-jobs", body, idempotency_key=idempotency_key))

    def finetune(
        self,
        config: FinetuneConfig | None = None,
        *,
        method: str = "hscr",
        evaluate: EvaluateConfig | None = None,
        auto_promote: bool = False,
        idempotency_key: str | None = None,
    ) -> Job:
        """Train on all live consented records of `method`; with `evaluate`, judge the result."""
        body = finetune_body(config, method=method, evaluate=evaluate, auto_promote=auto_promote)
        return _record(Job, self._http.post("/v1/finetune-jobs", body, idempotency_key=idempotency_key))

    def evaluate(
        self,
        adapter: str,
        config: EvaluateConfig | None = None,
        *,
        auto_promote: bool = False,
        idempotency_key: str | None = None,
    ) -> Job:
        """Judge a version against the active one through the engine."""
        settings = (config or EvaluateConfig()).resolved()
        body = {"adapter": adapter, "config": settings, "auto_promote": auto_promote}
        return _record(Job, self._http.post("/v1/evaluations", body, idempotency_key=idempotency_key))

    def preferences(self, *, limit: int = 200, **filters: str) -> Iterator[PreferenceRecord]:
        """All records, newest first, page by page. `filters`: method, job_id."""
        before: str | None = None
        while True:
            page = self._http.get("/v1/preferences", limit=limit, before=before, **filters)
            yield from _records(PreferenceRecord, page["data"])
            before = page["next_before"]
            if before is None:
                return

    # -- jobs ----------------------------------------------------------------------------------------------

    def job(self, job_id: str) -> Job:
        return _record(Job, self._http.get(f"/v1/jobs/{job_id}"))

    def jobs(self, *, limit: int = 50, **filters: str) -> list[Job]:
        """Newest first. `filters`: kind, state, parent."""
        return _records(Job, self._http.get("/v1/jobs", limit=limit, **filters)["data"])

    def cancel(self, job_id: str) -> Job:
        return _record(Job, self._http.delete(f"/v1/jobs/{job_id}"))

    def retry(self, job_id: str) -> Job:
        """Submit a failed or cancelled job again; asked twice, it is the same new job."""
        return _record(Job, self._http.post(f"/v1/jobs/{job_id}/retry", {}))

    def follow(self, job_id: str, *, after: int = 0) -> Iterator[JobEvent]:
        """The job's events from `after` on, as they happen, up to its final state.

        A broken connection is resumed by Last-Event-ID, so every event comes once.
        """
        lost_at: float | None = None
        while True:
            try:
                for event in self._job_events(job_id, after):
                    after, lost_at = event.seq, None
                    yield event
                    if event.type == "state" and JobState(event.data["state"]).final:
                        return
            except GatewayUnreachable:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > OUTAGE_SECONDS:
                    raise
            time.sleep(0.25)  # between two connections, so that a gateway that restarts is not hammered

    def _job_events(self, job_id: str, after: int) -> Iterator[JobEvent]:
        headers = {"Last-Event-ID": str(after)} if after else {}
        for event in self._http.events("GET", f"/v1/jobs/{job_id}/events", headers=headers):
            yield _record(JobEvent, event.data)

    def wait(self, job_id: str, on_event: Callable[[JobEvent], None] = lambda _event: None) -> Job:
        """Follow a job to its end. Raises the HscrError that made it fail, JobCancelled."""
        for event in self.follow(job_id):
            on_event(event)
        job = self.job(job_id)
        if job.state is not JobState.SUCCEEDED:
            raise known(**(job.error or _CANCELLED))
        return job

    def next_job(self, job_id: str) -> Job | None:
        """The job that this one submitted, if any."""
        return next(iter(self.jobs(parent=job_id, limit=1)), None)

    # -- releases ------------------------------------------------------------------------------------------

    def pointer(self) -> Pointer:
        return _record(Pointer, self._http.get("/v1/adapters")["pointer"])

    def adapters(self) -> list[AdapterVersion]:
        """Newest first."""
        return _records(AdapterVersion, self._http.get("/v1/adapters")["data"])

    def canary_counts(self) -> dict[str, VersionCounts]:
        """What came of each version's requests in the canary that runs; empty without one."""
        found = self._http.get("/v1/adapters")["canary"]
        return {version: VersionCounts.model_validate(counts) for version, counts in found.items()}

    def evaluations(self) -> list[Evaluation]:
        """Newest first."""
        return _records(Evaluation, self._http.get("/v1/evaluations")["data"])

    def evaluation(self, evaluation_id: str) -> Evaluation:
        return _record(Evaluation, self._http.get(f"/v1/evaluations/{evaluation_id}"))

    def outcomes(self, evaluation_id: str) -> dict[str, list[Outcome]]:
        """Every scored answer behind an evaluation, by version name (`base` for none)."""
        found = self._http.get(f"/v1/evaluations/{evaluation_id}/outcomes")
        return {version: [Outcome(**outcome) for outcome in rows] for version, rows in found.items()}

    def promote(
        self, version: str, *, reason: str, override: bool = False, evaluation_id: str | None = None
    ) -> Job:
        """Release a version. Raises GateRefused when no evaluation passed and `override` is false."""
        body = {"reason": reason, "override": override, "evaluation_id": evaluation_id}
        return _record(Job, self._http.post(f"/v1/adapters/{version}/promote", body))

    def canary(
        self,
        version: str,
        share: float,
        *,
        reason: str,
        override: bool = False,
        evaluation_id: str | None = None,
    ) -> Job:
        """Let a version answer a share (0 to 1) of the traffic. Raises as `promote` does."""
        body = {"share": share, "reason": reason, "override": override, "evaluation_id": evaluation_id}
        return _record(Job, self._http.post(f"/v1/adapters/{version}/canary", body))

    def end_canary(self, *, reason: str) -> Pointer:
        """All traffic to the active version again."""
        return _record(Pointer, self._http.post("/v1/adapters/end-canary", {"reason": reason}))

    def rollback(self, *, reason: str) -> Pointer:
        """Back to the previous version, which is still loaded."""
        return _record(Pointer, self._http.post("/v1/adapters/rollback", {"reason": reason}))

    def delete_study(self, study: str) -> dict[str, Any]:
        """Forget a study and what was derived from it; tells which adapters were trained on it."""
        return self._http.delete(f"/v1/studies/{study}")

    def tombstone(self, study: str) -> Tombstone:
        """What is left of a deleted study. Raises NotFound."""
        return _record(Tombstone, self._http.get(f"/v1/studies/{study}"))

    def ready(self) -> bool:
        """Whether the gateway answers questions now."""
        return http_ok(f"{self.url}/readyz")


def finetune_body(
    config: FinetuneConfig | None = None,
    *,
    method: str = "hscr",
    evaluate: EvaluateConfig | None = None,
    auto_promote: bool = False,
) -> dict[str, Any]:
    """A fine-tune as the API takes it: on its own, or as what follows a generation."""
    return {
        "config": (config or FinetuneConfig()).resolved(),
        "method": method,
        "evaluate": evaluate.resolved() if evaluate else None,
        "auto_promote": auto_promote,
    }


def _asked(image: bytes, **fields: Any) -> dict[str, Any]:
    sampling = fields.pop("sampling", None) or Sampling()
    given = {name: value for name, value in fields.items() if value is not None}
    return {"image": _base64(image), "sampling": sampling.model_dump(mode="json"), **given}


def _base64(data: bytes) -> str:
    return b64encode(data).decode()


def _record(kind: type[R], body: Mapping[str, Any]) -> R:
    """A reply may carry more than the record: notices, flags."""
    return kind.model_validate({name: value for name, value in body.items() if name in kind.model_fields})


def _records(kind: type[R], bodies: Sequence[Mapping[str, Any]]) -> list[R]:
    return [_record(kind, body) for body in bodies]
