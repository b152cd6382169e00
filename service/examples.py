"""One valid example of each body, made of the types themselves, so that none can go stale."""

from datetime import UTC, datetime

from pydantic import BaseModel

from hscr.config import EvaluateConfig
from hscr.evaluate.outcome import Outcome
from hscr.records import (
    AdapterVersion,
    Answer,
    AnswerKind,
    Dropping,
    Evaluation,
    Feedback,
    GateVerdict,
    Image,
    Interval,
    Job,
    JobKind,
    Pointer,
    PreferenceRecord,
    Provenance,
    Recipe,
    Response,
    Sampling,
    TokenDependence,
    Tombstone,
    Verdict,
    VersionCounts,
    VisualDependence,
)
from service import schemas as s
from workers.contract import FinetunePayload, GeneratePayload

_WHEN = datetime(2026, 11, 22, 9, 30, tzinfo=UTC)
_HEX = "3f9c2a7b1d4e" + "0" * 52
_VERSION = "hscr@3f9c2a7b1d4e"
_RECIPE = Recipe(name="raster@1", digest=_HEX, parameters={"max_side": 1024})
_IMAGE = Image(digest=_HEX, source_digest=_HEX, width=224, height=224, media_type="image/png", recipe=_RECIPE)
_ANSWER = Answer(
    id="ans_1",
    kind=AnswerKind.VQA,
    study="study_1",
    image=_IMAGE,
    question="Is there a pleural effusion?",
    text="No.",
    finish_reason="stop",
    provenance=Provenance(
        model="phantom",
        model_digest=_HEX,
        adapter=_VERSION,
        adapter_digest=_HEX,
        recipe=_RECIPE,
        template_digest=_HEX,
        sampling=Sampling(),
        numeric_mode="cpu/float32",
        engine="embedded/0.1.0",
    ),
    key_id="key_1",
    created_at=_WHEN,
)
_VIEW = s.AnswerView.of(_ANSWER)
_FEEDBACK = Feedback(
    id="fb_1",
    answer_id="ans_1",
    verdict=Verdict.CORRECT,
    correction="Yes, on the left.",
    trainable=True,
    created_at=_WHEN,
)
_JOB = Job(
    id="job_1",
    kind=JobKind.GENERATE,
    payload=GeneratePayload(then=FinetunePayload()).stored(),
    key_id="key_1",
    created_at=_WHEN,
)
_ADAPTER = AdapterVersion(
    name=_VERSION,
    digest=_HEX,
    base_digest=_HEX,
    job_id="job_2",
    config={"rank": 16},
    records=120,
    records_digest=_HEX,
    metrics={"loss": 0.4},
    created_at=_WHEN,
)
_STANDING = s.AdapterView(
    **dict(_ADAPTER), active=True, previous=False, candidate=False, loaded_on=["engine-0"]
)
_POINTER = Pointer(active=_VERSION, epoch=3)
_EVALUATION = Evaluation(
    id="eval_1",
    candidate=_VERSION,
    active=None,
    suite="phantom",
    questions=480,
    images=120,
    scores={"base": {"macro_score": 0.61}, _VERSION: {"macro_score": 0.7}},
    differences={"macro_score": Interval(mean=0.09, low=0.04, high=0.14)},
    verdict=GateVerdict.PASS,
    reasons=("macro_score is better",),
    created_at=_WHEN,
)
_OUTCOME = Outcome(
    item_id="test-0-0",
    cluster="test-0",
    kind="presence",
    truth_class="yes",
    truth="yes",
    text="Yes.",
    score=1.0,
    parsed=True,
)
_PREFERENCE = PreferenceRecord(
    id="pref_1",
    image_digest=_HEX,
    study="study_1",
    question="Is there a pleural effusion?",
    chosen="Yes, on the left.",
    rejected=(Response(text="Yes, on the right.", similarity=0.8, mean_probability=0.3),),
    source="fb_1",
    method="hscr",
    model_digest=_HEX,
    config_digest=_HEX,
    consent=True,
    created_at=_WHEN,
)
_CHANGE = s.PointerChange(
    epoch=3,
    action="promote",
    actor="key_1",
    reason="passed the gate",
    evaluation="eval_1",
    override=False,
    created_at=_WHEN,
)
_DEPENDENCE = VisualDependence(
    answer_id="ans_1",
    score=0.4,
    tokens=(
        TokenDependence(text="No", content=True, full=-0.2, dropped=-0.6, difference=0.4),
        TokenDependence(text=".", content=False, full=-0.1, dropped=-0.1, difference=0.0),
    ),
    dropping=Dropping(),
    model_digest=_HEX,
    adapter=_VERSION,
    adapter_digest=_HEX,
    numeric_mode="cpu/float32",
    vision_numeric_mode="cpu/float32",
    engine="embedded/0.1.0",
    job_id="job_1",
    created_at=_WHEN,
)
_IMAGE_URL = s.ImageUrl(url=f"data:image/png;base64,{s.PIXEL}")
_CHAT = [
    s.ImagePart(type="image_url", image_url=_IMAGE_URL),
    s.TextPart(type="text", text="Is there a pleural effusion?"),
]
_MODEL = s.ModelView(
    id=_VERSION,
    created=1_795_340_000,
    parent="phantom",
    active=True,
    previous=False,
    candidate=False,
    replicas=1,
    intended_use="Research on synthetic phantoms only.",
)

_ALL: tuple[BaseModel, ...] = (
    s.VqaBody(image=s.PIXEL, question="Is there a pleural effusion?"),
    s.CaptionBody(image=s.PIXEL),
    s.ChatBody(model="active", messages=[s.ChatMessage(role="user", content=[*_CHAT])]),
    s.ChatCompletion(
        id="ans_1",
        created=1_795_340_000,
        model=_VERSION,
        choices=[s.ChatChoice(message=s.ChatReply(content="No."), finish_reason="stop")],
        usage=s.ChatUsage(prompt_tokens=80, completion_tokens=3, total_tokens=83),
    ),
    _VIEW,
    s.AnswerPage(data=[_VIEW], next_before=_WHEN),
    s.DependenceBody(),
    s.DependenceView.of(_DEPENDENCE),
    s.ModelList(data=[_MODEL]),
    s.FeedbackBody(answer_id="ans_1", verdict=Verdict.CORRECT, correction="Yes, on the left."),
    _FEEDBACK,
    s.PreferenceJobBody(
        rows=[s.Row(image=s.PIXEL, question="Is there a pleural effusion?", answer="Yes.")], consent=True
    ),
    FinetunePayload(),
    s.EvaluationJobBody(adapter=_VERSION, config=EvaluateConfig(split="test")),
    _JOB,
    s.JobPage(data=[_JOB], next_before=None),
    s.PreferencePage(data=[_PREFERENCE], next_before=None),
    s.AdapterList(data=[_STANDING], pointer=_POINTER, canary={"base": VersionCounts()}),
    s.PromoteBody(reason="passed the gate"),
    s.CanaryBody(reason="passed the gate; first on a tenth of the traffic", share=0.1),
    s.RollbackBody(reason="reviewers report more omissions"),
    _POINTER,
    _EVALUATION,
    s.Outcomes({_VERSION: [_OUTCOME]}),
    s.EvaluationList(data=[_EVALUATION]),
    s.Lineage(
        answer=_VIEW,
        image=_IMAGE,
        image_stored=True,
        adapter=_ADAPTER,
        trained_on=["pref_1"],
        evaluations=[_EVALUATION],
        promotions=[_CHANGE],
        visual_dependence=_DEPENDENCE,
        feedback=[_FEEDBACK],
        preferences=["pref_1"],
        used_by=[],
    ),
    Tombstone(study="study_1", actor="key_1", created_at=_WHEN, adapters=(_VERSION,)),
    s.StudyDeletion(study="study_1", images_deleted=1, adapters_trained_on_it=[_VERSION]),
    s.Health(),
    s.Readiness(epoch=3, active=_VERSION, replicas=1),
    s.ProblemDescription(
        type="/problems/invalid-image",
        title="The image cannot be read",
        status=422,
        description="Bytes that are no readable image.",
    ),
)

EXAMPLES: dict[type[BaseModel], BaseModel] = {type(example): example for example in _ALL}
