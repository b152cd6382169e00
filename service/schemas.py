"""The bodies that the API takes and gives, beside the records of the domain itself."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from hscr.config import EvaluateConfig, GenerateConfig
from hscr.evaluate.outcome import Outcome
from hscr.records import (
    AdapterVersion,
    Answer,
    Evaluation,
    Feedback,
    Image,
    Job,
    Pointer,
    PreferenceRecord,
    Sampling,
    Verdict,
    VersionCounts,
    VisualDependence,
)
from workers.contract import FinetunePayload

NOTICE = "Research use only. Not for clinical care or any clinical decision."

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="

StudyName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=100,
        pattern=r"^[A-Za-z0-9._:@-]+$",
        description="groups what belongs to one examination; a pseudonym, never a person's identifier",
    ),
]
VersionName = Annotated[str, Field(min_length=1, max_length=120, examples=["hscr@3f9c2a7b1d4e"])]


class Body(BaseModel):
    """A request body: an unknown key is an error, so that a typo is not silently ignored."""

    model_config = ConfigDict(extra="forbid")


# -- asking --------------------------------------------------------------------------------------------------


class ImageBody(Body):
    """What every question about an image may carry."""

    image: str = Field(
        description="PNG, JPEG or DICOM as base64, or as a base64 data URL; told apart by content",
        examples=[PIXEL],
    )
    adapter: VersionName | None = Field(
        default=None,
        description="`active` (the default), `base`, or a version that GET /v1/models lists",
    )
    sampling: Sampling = Sampling()
    study: StudyName | None = Field(
        default=None, description="absent: the keyed hash of the DICOM study, else a new one"
    )
    frame: int | None = Field(default=None, ge=0, description="of a multi-frame DICOM file, from 0")
    window: str | None = Field(
        default=None, max_length=40, description="name of a CT window; absent: as the file says"
    )
    stream: bool = Field(
        default=False, description="server-sent events: `delta`..., then `answer` or `error`"
    )


class VqaBody(ImageBody):
    """A question about one image."""

    question: str = Field(description="1 to 2000 characters", examples=["Is there a pleural effusion?"])


class CaptionBody(ImageBody):
    """A description of one image."""

    prompt: str | None = Field(default=None, description="absent: the model's own caption prompt")


class AnswerView(Answer):
    """An answer with its provenance."""

    notice: str = NOTICE

    @classmethod
    def of(cls, answer: Answer) -> "AnswerView":
        return cls(**dict(answer))


class Delta(BaseModel):
    """A piece of a streamed answer; the texts of all pieces concatenate to the whole."""

    text: str


# -- OpenAI's chat -------------------------------------------------------------------------------------------


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: str = Field(description="a base64 data URL; addresses are refused, nothing is fetched")
    detail: Literal["auto", "low", "high"] | None = Field(
        default=None, description="accepted, without effect"
    )


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(Body):
    role: Literal["system", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class StreamOptions(Body):
    include_usage: bool = False


class ChatBody(Body):
    """OpenAI's chat request as far as it applies here; exactly one image among the user's messages."""

    model: str = Field(description="`active`, the base model's name or `base`, or a version", max_length=200)
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=1024)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1024)
    seed: int = 0
    stop: str | list[str] | None = None
    n: Literal[1] = 1
    user: str | None = Field(default=None, description="accepted and dropped")
    study: StudyName | None = None


class ChatUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: Literal[0] = 0
    message: ChatReply
    finish_reason: str


class ChatCompletion(BaseModel):
    """OpenAI's chat.completion; `id` names the kept answer: GET /v1/answers/{id}."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage


class ModelView(BaseModel):
    """A model name that a request may use now."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hscr"
    parent: str | None = Field(description="the base model of an adapter")
    active: bool
    previous: bool
    candidate: bool
    replicas: int = Field(description="ready replicas that serve it")
    intended_use: str = Field(description="from the model's own card")
    notice: str = NOTICE


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelView]


class DependenceBody(Body):
    """How an answer is scored; a request without a body is one with the defaults."""

    mode: Literal["zero", "delete"] = Field(
        default="zero",
        description="what becomes of a dropped visual token: emptied in its place, or left out. `delete` is "
        "refused: engines make no promise about fewer visual tokens than an image has",
    )


class DependenceView(VisualDependence):
    """How much the image changed each word of an answer, in nats. It is no explanation of the answer.

    The score is the mean difference over content tokens. A high one says that the words hang on the image,
    not that they are right.
    """

    notice: str = NOTICE

    @classmethod
    def of(cls, found: VisualDependence) -> "DependenceView":
        return cls(**dict(found))


# -- judging and learning ------------------------------------------------------------------------------------


class FeedbackBody(Body):
    """What a person thinks of an answer."""

    answer_id: str = Field(max_length=80)
    verdict: Verdict
    correction: str | None = Field(
        default=None, max_length=2000, description="the right answer; required by `correct`"
    )
    comment: str | None = Field(default=None, max_length=2000)


class Row(Body):
    """An image, a question about it, and the answer known to be right."""

    image: str = Field(description="as in POST /v1/vqa", examples=[PIXEL])
    question: str
    answer: str
    study: StudyName | None = None


class PreferenceJobBody(Body):
    """From reviewers' feedback that is still pending (neither `rows` nor `source_ids`), or from these."""

    source_ids: list[str] | None = Field(default=None, description="ids of feedback or of earlier rows")
    rows: list[Row] | None = Field(default=None, min_length=1)
    consent: bool = Field(default=False, description="that `rows` may be trained on; required for them")
    config: GenerateConfig = GenerateConfig()
    then: FinetunePayload | None = Field(
        default=None, description="the fine-tune that follows; operators only"
    )


class EvaluationJobBody(Body):
    adapter: VersionName
    config: EvaluateConfig = EvaluateConfig()
    auto_promote: bool = False


class PromoteBody(Body):
    """Why a version shall serve. `override` sets aside a gate that did not pass, on the caller's record."""

    reason: str = Field(min_length=1, max_length=500)
    override: bool = False
    evaluation_id: str | None = None


class CanaryBody(PromoteBody):
    """As for a promotion; the version answers a share of the questions that name none."""

    share: float = Field(gt=0, lt=1, description="sticky by key and study, or image", examples=[0.1])


class RollbackBody(Body):
    """Why traffic goes back: to the previous version, or from a candidate's share to the active one."""

    reason: str = Field(min_length=1, max_length=500)


# -- lists and stories ---------------------------------------------------------------------------------------


class AnswerPage(BaseModel):
    data: list[AnswerView]
    next_before: datetime | None = Field(description="`before` of the next page; null at the end")


class PreferencePage(BaseModel):
    data: list[PreferenceRecord]
    next_before: datetime | None = None


class JobPage(BaseModel):
    data: list[Job]
    next_before: datetime | None = None


class EvaluationList(BaseModel):
    data: list[Evaluation]


class Outcomes(RootModel[dict[str, list[Outcome]]]):
    """Every scored answer behind an evaluation, by version name (`base` for none)."""


class AdapterView(AdapterVersion):
    """A trained version and where it stands."""

    active: bool
    previous: bool
    candidate: bool
    loaded_on: list[str] = Field(description="live replicas that report it loaded and probed")


class AdapterList(BaseModel):
    data: list[AdapterView]
    pointer: Pointer
    canary: dict[str, VersionCounts] = Field(
        description="what came of each version's requests (`base` for none) while the present share is given"
    )


class PointerChange(BaseModel):
    """One line of the pointer's history."""

    epoch: int
    action: str
    actor: str
    reason: str
    evaluation: str | None
    override: bool
    created_at: datetime


class Lineage(BaseModel):
    """Where an answer came from, and what became of it."""

    answer: AnswerView
    image: Image
    image_stored: bool = Field(description="false once it expired or was deleted")
    adapter: AdapterVersion | None = Field(description="null: the base model answered")
    trained_on: list[str] = Field(description="ids of the adapter's preference records, deleted ones too")
    evaluations: list[Evaluation]
    promotions: list[PointerChange] = Field(description="each time the adapter was made to serve")
    visual_dependence: VisualDependence | None = Field(
        description="how much the image changed its words, if that was asked; no explanation"
    )
    feedback: list[Feedback]
    preferences: list[str] = Field(description="ids of the records made from this answer's feedback")
    used_by: list[str] = Field(description="adapters that were trained on this answer's feedback")


class StudyDeletion(BaseModel):
    """What deleting a study did, and what only training again can do."""

    study: str
    images_deleted: int
    adapters_trained_on_it: list[str] = Field(description="train again without it: nothing is unlearned")


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    status: Literal["ok"] = "ok"
    epoch: int
    active: str
    replicas: int


class ProblemDescription(BaseModel):
    """What a problem type means."""

    type: str
    title: str
    status: int
    description: str
