"""The value types everything else speaks in: immutable, validated, JSON both ways, without wires."""

import hashlib
import re
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal, Self
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field


def new_id(prefix: str) -> str:
    """`<prefix>_<32 hex digits>`; the prefix tells a reader of logs what the id names."""
    return f"{prefix}_{uuid4().hex}"


def now() -> datetime:
    """The present moment, UTC, timezone-aware."""
    return datetime.now(UTC)


_TURNS = re.compile(r"(?:system|user|assistant): .*\n(?:system|user|assistant): ", re.DOTALL)


class Record(BaseModel):
    """Frozen and strict about unknown keys, so that a typo is an error and not a lost value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def but(self, **changes: Any) -> Self:
        """A copy with the given fields replaced, validated again."""
        return type(self).model_validate({**self.model_dump(), **changes})


class Recipe(Record):
    """How bytes became pixels: a named preprocessing whose digest covers every parameter."""

    name: str = Field(examples=["dicom-ct-lung@1"])
    digest: str = Field(description="SHA-256 over name and parameters, hex")
    parameters: dict[str, Any] = Field(default_factory=dict)


class Image(Record):
    """A prepared image: an upright 8-bit PNG without metadata, stored under its digest."""

    digest: str = Field(description="SHA-256 of the PNG bytes, hex; also the blob's name")
    source_digest: str = Field(description="SHA-256 of the bytes as uploaded, hex")
    width: int = Field(gt=0, description="pixels")
    height: int = Field(gt=0, description="pixels")
    media_type: str = Field(description="of the upload", examples=["application/dicom"])
    modality: str | None = Field(default=None, description="DICOM (0008,0060) where known")
    recipe: Recipe


class Sampling(Record):
    """Decoding settings as sent to the engine; temperature 0 is greedy."""

    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_tokens: int = Field(default=64, ge=1, le=1024)
    seed: int = 0
    stop: tuple[str, ...] = ()


class Provenance(Record):
    """What made an answer (design invariant 1)."""

    model: str
    model_digest: str = Field(description="SHA-256 over the base model's files, hex")
    adapter: str | None = Field(description="immutable version `<alias>@<sha256 prefix>`; None is the base")
    adapter_digest: str | None
    recipe: Recipe
    template_digest: str = Field(description="SHA-256 of the chat template, hex")
    sampling: Sampling
    numeric_mode: str = Field(description="device and dtype of the engine", examples=["cpu/float32"])
    engine: str = Field(description="name and version of the engine", examples=["embedded/0.1.0"])


class AnswerKind(StrEnum):
    VQA = "vqa"
    CAPTION = "caption"
    CHAT = "chat"


class Answer(Record):
    id: str = Field(default_factory=lambda: new_id("ans"))
    kind: AnswerKind
    study: str = Field(description="groups what belongs to one examination; deletion works on it")
    project: str = "default"
    image: Image
    question: str
    text: str
    finish_reason: str
    provenance: Provenance
    key_id: str | None = Field(default=None, description="the API key that asked")
    train_consent: bool = Field(default=False, description="by policy of the project or key at the time")
    created_at: datetime = Field(default_factory=now)

    @property
    def conversation(self) -> bool:
        """Whether `question` looks like the several turns of a chat, which are kept as one text."""
        return self.kind is AnswerKind.CHAT and _TURNS.match(self.question) is not None


class Verdict(StrEnum):
    ACCEPT = "accept"
    CORRECT = "correct"
    REJECT = "reject"


class Feedback(Record):
    """A person's judgement of one answer; trains only when a reviewer gave it and consent exists."""

    id: str = Field(default_factory=lambda: new_id("fb"))
    answer_id: str
    verdict: Verdict
    correction: str | None = Field(default=None, description="the right answer; required by `correct`")
    comment: str | None = None
    key_id: str | None = None
    trainable: bool = Field(description="reviewer's role and consent, decided when it was given")
    created_at: datetime = Field(default_factory=now)


class Substitution(Record):
    """One replaced token: its position in the preferred answer (0-based), ids before and after."""

    position: int = Field(ge=0)
    old_id: int
    new_id: int
    sensitivity: float = Field(description="the configuration's sensitivity score of the old token")
    contrast_probability: float = Field(ge=0, le=1, description="P_diff of the new token (HSCR Eq. 3)")


class Change(Record):
    """One token that differs from the substituted answer, to agree with it or because all was decoded."""

    position: int = Field(ge=0, description="0-based; beyond the preferred answer's end where it got longer")
    old_id: int | None = Field(description="None where the answer got longer")
    new_id: int | None = Field(description="None where it ends earlier")


class Response(Record):
    """One dispreferred answer. `similarity` in [0, 1] to the preferred one orders the levels.

    Its tokens are the preferred answer's with `substitutions` and then `changes` applied to it.
    """

    text: str
    similarity: float = Field(ge=0, le=1)
    mean_probability: float = Field(
        ge=0,
        le=1,
        description="exp(mean token log p) of the text, under the model that made it, with the whole image",
    )
    substitutions: tuple[Substitution, ...] = Field(
        default=(), description="tokens replaced by contrast; `changes` may have replaced some again"
    )
    changes: tuple[Change, ...] = Field(default=(), description="tokens replaced after them, to agree")


class PreferenceRecord(Record):
    """An image, a prompt, the preferred answer and its dispreferred ones by descending similarity."""

    id: str
    image_digest: str
    study: str
    project: str = "default"
    question: str
    chosen: str
    rejected: tuple[Response, ...] = Field(min_length=1)
    source: str = Field(description="id of the feedback or dataset row it came from")
    method: str = Field(examples=["hscr", "random"])
    model_digest: str
    adapter: str | None = None
    numeric_mode: str | None = Field(default=None, description="device and dtype it was made in")
    config_digest: str
    seed: int | None = Field(default=None, description="of the configuration")
    embedder: str | None = Field(
        default=None, description="name and digest of the model behind `similarity`, if one is"
    )
    consent: bool
    job_id: str | None = None
    created_at: datetime = Field(default_factory=now)


class PreferenceSource(Record):
    """What a generator starts from: a question about an image and the answer known to be right."""

    id: str
    image_digest: str
    study: str
    project: str = "default"
    question: str
    chosen: str
    consent: bool


class AdapterState(StrEnum):
    READY = "ready"
    RETIRED = "retired"
    REFUSED = "refused"


_VERSION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}@(?P<digest>[0-9a-f]{1,64})")


class AdapterVersion(Record):
    """An immutable LoRA adapter. Its name is `<alias>@<first 12 hex digits of digest>`."""

    name: str
    digest: str = Field(description="SHA-256 over its files, hex")
    base_digest: str
    state: AdapterState = AdapterState.READY
    job_id: str
    config: dict[str, Any]
    records: int = Field(ge=0, description="how many preference records it was trained on")
    records_digest: str = Field(description="SHA-256 over their sorted ids, hex")
    metrics: dict[str, float] = Field(default_factory=dict)
    probe: dict[str, Any] = Field(
        default_factory=dict, description="prompts and log-probs an engine must match"
    )
    created_at: datetime = Field(default_factory=now)

    @property
    def well_named(self) -> bool:
        """Whether the name is safe in any path or log, and stands for these very bytes."""
        match = _VERSION_NAME.fullmatch(self.name)
        return match is not None and self.digest.startswith(match["digest"])


class GateVerdict(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


class Interval(Record):
    """A difference with its two-sided 95 % interval, paired and clustered by image."""

    mean: float
    low: float
    high: float


class Evaluation(Record):
    id: str = Field(default_factory=lambda: new_id("eval"))
    job_id: str | None = None
    candidate: str | None
    active: str | None
    suite: str
    questions: int
    images: int
    scores: dict[str, dict[str, float]] = Field(description="per version name (`base` for None), per metric")
    differences: dict[str, Interval] = Field(description="candidate - active, per metric")
    verdict: GateVerdict
    reasons: tuple[str, ...]
    config: dict[str, Any] = Field(default_factory=dict)
    created_at: datetime = Field(default_factory=now)


class Pointer(Record):
    """Which adapter serves: one row; `epoch` rises with each change. None names the base model."""

    active: str | None = None
    previous: str | None = None
    candidate: str | None = None
    share: float = Field(default=0.0, ge=0, le=1, description="of traffic that goes to the candidate")
    epoch: int = 0


class VersionCounts(Record):
    """What one version's requests came to while a canary ran. Add them to sum over gateways."""

    requests: int = Field(default=0, description="that got a text or failed")
    errors: int = Field(default=0, description="failures of the engine, before or after the first text")
    texts: int = Field(default=0, description="requests that got one")
    seconds: float = Field(default=0.0, description="summed over `texts`: from the call to the first text")

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    @property
    def mean_seconds(self) -> float:
        return self.seconds / self.texts if self.texts else 0.0

    def __add__(self, other: "VersionCounts") -> "VersionCounts":
        return VersionCounts(
            requests=self.requests + other.requests,
            errors=self.errors + other.errors,
            texts=self.texts + other.texts,
            seconds=self.seconds + other.seconds,
        )


class Replica(Record):
    """One engine as its agent last saw it."""

    id: str
    address: str = Field(description="base URL", examples=["http://127.0.0.1:8100"])
    model: str
    model_digest: str
    engine: str
    numeric_mode: str
    template_digest: str
    intended_use: str = Field(default="", description="from the model's own card")
    loaded: tuple[str, ...] = Field(description="adapter versions loaded and probed")
    ready: bool
    problem: str | None = None
    seen_at: datetime


class Dropping(Record):
    """How visual tokens are dropped: which, how many, and what becomes of them. Equal ones compare."""

    mode: Literal["zero", "delete"] = Field(
        default="zero", description="`zero` keeps a dropped token's place and empties it"
    )
    rate: float = Field(default=0.7, gt=0, lt=1, description="share of the visual tokens that is dropped")
    masks: int = Field(default=8, ge=1, le=64, description="random choices averaged over")
    seed: int = Field(default=0, description="with the image's digest it fixes every mask")

    @property
    def digest(self) -> str:
        """SHA-256, hex: what was measured under one compares with what was measured under the same."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class TokenDependence(Record):
    """How probable one token of an answer was, in nats, with the whole image and without most of it."""

    text: str
    content: bool = Field(description="holds a letter or digit; others do not count")
    full: float = Field(description="log p(token | image)")
    dropped: float = Field(description="log p(token | what is left of it), mean over the masks")
    difference: float = Field(description="full - dropped")


class VisualDependence(Record):
    """How much the image changed the words of one answer. It is no explanation of them.

    `score`: mean difference over content tokens, in nats; 0 for an answer without any.
    """

    answer_id: str
    score: float
    tokens: tuple[TokenDependence, ...]
    dropping: Dropping
    model_digest: str
    adapter: str | None = Field(description="the version that answered, and judged itself; None is the base")
    adapter_digest: str | None
    numeric_mode: str = Field(description="device and dtype of the engine", examples=["cpu/float32"])
    vision_numeric_mode: str = Field(description="device and dtype that made the visual tokens")
    engine: str
    job_id: str
    created_at: datetime = Field(default_factory=now)


class Tombstone(Record):
    """What is left of a deleted study: no new material is taken under its name."""

    study: str
    actor: str = Field(description="the API key that deleted it")
    created_at: datetime = Field(description="when it was deleted")
    adapters: tuple[str, ...] = Field(description="versions trained on it; training again leaves it out")


class JobKind(StrEnum):
    GENERATE = "generate"
    FINETUNE = "finetune"
    SCORE = "score"
    SCORE_ANSWER = "score_answer"
    EVALUATE = "evaluate"
    RELEASE = "release"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


class Job(Record):
    id: str = Field(default_factory=lambda: new_id("job"))
    kind: JobKind
    state: JobState = JobState.QUEUED
    payload: dict[str, Any] = Field(default_factory=dict, description="ids and settings, never patient data")
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = Field(default=None, description="slug, detail, remedy")
    attempt: int = Field(
        default=0,
        description="rises each time a worker takes the job; fences its writes",
    )
    cancel_requested: bool = False
    parent: str | None = Field(default=None, description="the job that submitted this one")
    key_id: str | None = None
    created_at: datetime = Field(default_factory=now)
    started_at: datetime | None = None
    finished_at: datetime | None = None


class JobEvent(Record):
    """A line of a job's story; `seq` rises from 1 within the job and is the SSE event id."""

    job_id: str
    seq: int
    type: Literal["state", "progress", "log"]
    data: dict[str, Any]
    created_at: datetime = Field(default_factory=now)


class Role(StrEnum):
    CLIENT = "client"
    REVIEWER = "reviewer"
    OPERATOR = "operator"


class ApiKey(Record):
    """A key as stored: only its hash. `train_consent` is the policy for what it sends."""

    id: str
    name: str
    role: Role
    project: str = "default"
    train_consent: bool = False
    created_at: datetime = Field(default_factory=now)
    revoked_at: datetime | None = None
