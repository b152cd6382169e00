"""What the gateway and the workers agree on: task names, queues and payloads. Nothing here runs anything.

A message carries a job's id and nothing else; everything else is read from the job's row, so a message that
is lost or doubled changes nothing.
"""

from typing import Any

from pydantic import Field

from hscr.config import EvaluateConfig, FinetuneConfig, GenerateConfig
from hscr.records import Dropping, JobKind, Record

CONTRACT_VERSION = 1

CONTROL, EVALUATE, GENERATE, SCORE, FINETUNE = "control", "evaluate", "generate", "score", "finetune"
QUEUES = (CONTROL, EVALUATE, GENERATE, SCORE, FINETUNE)

QUEUE_OF: dict[JobKind, str] = {
    JobKind.GENERATE: GENERATE,
    JobKind.FINETUNE: FINETUNE,
    JobKind.SCORE: SCORE,
    JobKind.SCORE_ANSWER: SCORE,
    JobKind.EVALUATE: EVALUATE,
    JobKind.RELEASE: CONTROL,
}


def task_name(kind: JobKind) -> str:
    """The Celery task that runs jobs of this kind."""
    return f"hscr.{kind.value}"


SWEEP_TASK = "hscr.sweep"
CHECK_STORE_TASK = "hscr.check_store"
CONSIDER_FINETUNE_TASK = "hscr.consider_finetune"
WATCH_CANARY_TASK = "hscr.watch_canary"


class Payload(Record):
    """Stored in the job's row as JSON; `version` lets an old row be understood by newer code."""

    version: int = CONTRACT_VERSION

    def stored(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class FinetunePayload(Payload):
    """Train from the base model on all live consented records; then, as asked, score, evaluate, release."""

    config: FinetuneConfig = FinetuneConfig()
    method: str = Field(
        default="hscr",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="of the records to train on; the versions' alias",
    )
    evaluate: EvaluateConfig | None = Field(default=EvaluateConfig(), description="None stops after training")
    auto_promote: bool = False


class GeneratePayload(Payload):
    """Make dispreferred answers for the named sources, or for every consented one that has none yet."""

    source_ids: tuple[str, ...] | None = None
    config: GenerateConfig = GenerateConfig()
    then: FinetunePayload | None = Field(default=None, description="the fine-tune that follows, if any")


class ScorePayload(Payload):
    """Measure visual dependence of the candidate, of the active version and of the base on the same texts."""

    candidate: str
    evaluate: EvaluateConfig
    auto_promote: bool = False


class ScoreAnswerPayload(Payload):
    """Measure how much the image changed the words of one answer, by the engine that serves its version."""

    answer_id: str
    dropping: Dropping = Dropping()


class EvaluatePayload(Payload):
    """Judge the candidate against the active version through the serving engine."""

    candidate: str
    score_job: str = Field(description="whose dependence scores the gate uses")
    evaluate: EvaluateConfig
    auto_promote: bool = False


class ReleasePayload(Payload):
    """Make a version the active one: because an evaluation passed, or a named person overrode it."""

    version_name: str | None = Field(description="None is the base model")
    evaluation_id: str | None = None
    actor: str
    reason: str
    override: bool = False
    share: float | None = Field(
        default=None, gt=0, lt=1, description="of the traffic, as a canary; None makes the version active"
    )


PAYLOADS: dict[JobKind, type[Payload]] = {
    JobKind.GENERATE: GeneratePayload,
    JobKind.FINETUNE: FinetunePayload,
    JobKind.SCORE: ScorePayload,
    JobKind.SCORE_ANSWER: ScoreAnswerPayload,
    JobKind.EVALUATE: EvaluatePayload,
    JobKind.RELEASE: ReleasePayload,
}
