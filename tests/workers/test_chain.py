"""The whole loop through real processes: records, training, judgement, release, and all three verdicts."""

import io
import os
from datetime import timedelta
from pathlib import Path

import pytest

from hscr.config import EvaluateConfig, FinetuneConfig
from hscr.models.phantom.anatomy import render
from hscr.models.phantom.data import TRAFFIC, sample_examples
from hscr.records import Evaluation, GateVerdict, Job, JobKind, JobState, PreferenceSource
from hscr.store.answers import hold_image
from hscr.store.releases import add_dependence
from hscr.store.store import Store
from tests.postgres_server import PostgresServer, programs
from tests.s3_server import S3Server
from tests.stored import images_in
from tests.waiting import wait_until
from tests.workers.engines import Engine, loaded, probe, register, replica, start_agent
from tests.workers.harness import RANDOM, Processes, finished, make_adapter, submit, succeeded
from workers.checkpoints import _pairs
from workers.contract import EvaluatePayload, FinetunePayload, GeneratePayload, ReleasePayload, ScorePayload
from workers.settings import EMBEDDED_MODEL, WorkerSettings

MODEL = str(EMBEDDED_MODEL)
# Small, and lenient with what junk answers do to the guards: the tests turn on the target alone.
EVALUATE = EvaluateConfig.parse(
    {
        "images": 20,
        "concurrency": 16,
        "dependence_questions": 16,
        "dependence_masks": 2,
        "gate": {"min_questions": 50, "hallucination_margin": 1.0, "dependence_margin": 100.0},
    }
)
TRAINING = FinetuneConfig(rank=4, epochs=2, learning_rate=5e-5)


@pytest.fixture
def settings(settings: WorkerSettings, s3: S3Server, request: pytest.FixtureRequest) -> WorkerSettings:
    """On a bucket, and on PostgreSQL where there is one; `make test-demo` runs the same loop without."""
    settings = settings.model_copy(update=s3.bucket())
    if not programs() and not os.environ.get("HSCR_REQUIRE_POSTGRES"):
        return settings
    server: PostgresServer = request.getfixturevalue("postgres")
    return settings.model_copy(update={"database_url": server.migrated()})


def add_corrections(store: Store, images: int) -> int:
    """Reviewers' corrections on questions about phantoms; returns how many."""
    sources = []
    for example in sample_examples(TRAFFIC, "traffic", images, 0, 2):
        buffer = io.BytesIO()
        render(example.phantom).save(buffer, "PNG")
        digest, study = store.blobs.put(buffer.getvalue()), f"study-{example.phantom.seed}"
        with store.database.write() as connection:
            hold_image(connection, digest, study, None)
        sources.append(
            PreferenceSource(
                id=example.id, image_digest=digest, study=study, question=example.question,
                chosen=example.answer, consent=True,
            )
        )  # fmt: skip
    store.preferences.add_sources(sources)
    return len(sources)


def child(store: Store, parent: Job, kind: JobKind) -> Job:
    """The job that the ended parent submitted."""
    (found,) = store.jobs.page(parent=parent.id)
    assert found.kind is kind
    return found


def judged(store: Store, candidate: str, *, auto_promote: bool = False) -> Evaluation:
    """Score and evaluate a version against the active one."""
    payload = ScorePayload(candidate=candidate, evaluate=EVALUATE, auto_promote=auto_promote)
    score = succeeded(store, submit(store, payload), seconds=90)
    job = succeeded(store, child(store, score, JobKind.EVALUATE), seconds=90)
    return store.releases.evaluation((job.result or {})["evaluation"])


def release(store: Store, version: str | None, *, override: bool = False) -> Job:
    payload = ReleasePayload(version_name=version, actor="key_1", reason="a test", override=override)
    return finished(store, submit(store, payload), seconds=60)


@pytest.mark.timeout(400)
def test_the_loop(store: Store, processes: Processes, engine: Engine, tmp_path: Path) -> None:
    """No process shares a disk with another, but the agent with its engine."""
    number = add_corrections(store, 30)
    homes = {name: str(tmp_path / name) for name in ("agent", "relay", "control", "gpu")}
    start_agent(processes, engine, HSCR_HOME=homes["agent"])
    processes.relay(HSCR_HOME=homes["relay"])
    control = {"HSCR_MODEL_PATH": MODEL, "HSCR_HOME": homes["control"]}
    processes.worker("control,evaluate", concurrency=2, **control)
    processes.worker("generate,score,finetune", HSCR_MODEL_PATH=MODEL, HSCR_HOME=homes["gpu"])

    # From corrections to a judged version, each job submitted by the one before.
    training = FinetunePayload(config=TRAINING, method="random", evaluate=EVALUATE)
    generate = submit(store, GeneratePayload(config=RANDOM, then=training))
    made = succeeded(store, generate, seconds=90)
    finetune = succeeded(store, child(store, made, JobKind.FINETUNE), seconds=90)
    score = succeeded(store, child(store, finetune, JobKind.SCORE), seconds=90)
    evaluate = succeeded(store, child(store, score, JobKind.EVALUATE), seconds=90)
    result, good = made.result or {}, (finetune.result or {})["adapter"]
    assert result["records"] + result["skipped"] == number
    assert store.releases.adapter(good).records == result["records"] >= 8
    assert {record.method for record in store.preferences.page()} == {"random"}
    (evaluation,) = store.releases.evaluations()
    assert evaluation.verdict is GateVerdict.INCONCLUSIVE, "three small steps show nothing"
    assert (evaluation.job_id, evaluation.candidate, evaluation.active) == (evaluate.id, good, None)
    assert evaluation.scores.keys() == {good, "base"}
    for scores in evaluation.scores.values():
        assert scores["macro_score"] > scores["macro_score_blank"], "the image is seen"
        wanted = {"macro_score_dropped", "visual_dependence", "hallucination_rate", "omission_rate"}
        assert wanted <= scores.keys()
    wait_until(lambda: loaded(store) == (), what="the version being unloaded after its judgement")

    # A person's recorded override makes it serve.
    released = release(store, good, override=True)
    assert released.state is JobState.SUCCEEDED, released.error
    assert store.releases.pointer().active == good
    assert loaded(store) == (good,)
    latest = store.releases.history()[0]
    assert (latest["actor"], latest["override"]) == ("key_1", True)

    # A ruined version fails, is not promoted without an override, and is not left as a candidate.
    folder = make_adapter(EMBEDDED_MODEL, tmp_path / "ruined", seed=1, scale=0.05)
    ruined = register(store, EMBEDDED_MODEL, folder, probe(EMBEDDED_MODEL, folder)).name
    assert judged(store, ruined).verdict is GateVerdict.FAIL
    refused = release(store, ruined)
    assert (refused.state, (refused.error or {})["slug"]) == (JobState.FAILED, "gate-refused")
    assert (store.releases.pointer().active, store.releases.pointer().candidate) == (good, None)
    kept = {path.name for home in homes.values() for path in Path(home).rglob("*") if path.is_file()}
    assert not kept & images_in(store), "an image stays in the bucket alone"

    # Where the ruined one serves, the good one passes, and replaces it by itself.
    assert release(store, ruined, override=True).state is JobState.SUCCEEDED
    evaluation = judged(store, good, auto_promote=True)
    assert evaluation.verdict is GateVerdict.PASS, evaluation.reasons
    assert evaluation.job_id is not None
    promotion = child(store, store.jobs.get(evaluation.job_id), JobKind.RELEASE)
    assert finished(store, promotion).state is JobState.SUCCEEDED
    pointer = store.releases.pointer()
    assert (pointer.active, pointer.previous) == (good, ruined)
    assert store.releases.history()[0]["evaluation"] == evaluation.id

    # The base model needs no evaluation; and what is active already is nothing to do.
    assert release(store, None).state is JobState.SUCCEEDED
    assert (release(store, None).result or {})["already_active"]


def test_a_release_without_a_ready_replica_says_which_and_why(
    store: Store, processes: Processes, engine: Engine, tmp_path: Path
) -> None:
    folder = make_adapter(EMBEDDED_MODEL, tmp_path / "a", seed=1, scale=0.05)
    version = register(store, EMBEDDED_MODEL, folder, probe(EMBEDDED_MODEL, folder))
    processes.relay()
    processes.worker("control", HSCR_MODEL_PATH=MODEL, HSCR_ROLLOUT_SECONDS="2")

    nobody = release(store, version.name, override=True)
    assert (nobody.error or {})["slug"] == "engine-unavailable"
    assert "No replica is live" in (nobody.error or {})["detail"]

    weights = store.blobs.folder(version.digest) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    start_agent(processes, engine)
    wait_until(lambda: replica(store), seconds=60)
    damaged = release(store, version.name, override=True)
    assert damaged.state is JobState.FAILED
    assert "one" in (damaged.error or {})["detail"]
    assert "not those that were stored" in (damaged.error or {})["detail"]
    assert store.releases.pointer().candidate is None


def scored(store: Store, tmp_path: Path) -> str:
    """A version that only its evaluation is missing for."""
    folder = make_adapter(EMBEDDED_MODEL, tmp_path / "a", seed=1, scale=0.05)
    version = register(store, EMBEDDED_MODEL, folder, probe(EMBEDDED_MODEL, folder)).name
    with store.database.write() as connection:
        for name in (None, version):
            add_dependence(connection, "job_scored", name, {"dependence": {}, "visual_dependence": 0.0})
    return version


def test_a_killed_evaluation_asks_only_what_it_has_no_answer_to(
    store: Store, processes: Processes, engine: Engine, tmp_path: Path
) -> None:
    version = scored(store, tmp_path)
    store.releases.propose(version, actor="test", reason="it stays loaded")
    start_agent(processes, engine)
    wait_until(lambda: version in loaded(store), seconds=60, what="the version")
    processes.relay()
    worker = processes.worker("evaluate", HSCR_MODEL_PATH=MODEL)
    many = EVALUATE.model_copy(update={"images": 60})
    payload = EvaluatePayload(candidate=version, score_job="job_scored", evaluate=many)

    def answered() -> float:
        return engine.metric("vllm:request_success_total")

    def evaluated(job: Job) -> Evaluation:
        ended = succeeded(store, job, seconds=120)
        return store.releases.evaluation((ended.result or {})["evaluation"])

    job = submit(store, payload)
    file = store.blobs.root / "checkpoints" / job.id / "1" / "answers.jsonl"

    def kept() -> int:
        return len(dict(_pairs(file)))

    wait_until(lambda: kept() > 20, seconds=90, what="answers")
    worker.kill()
    worker.wait()
    had = kept()
    wait_until(lambda: not engine.metric("vllm:num_requests_running"), what="the end of its requests")
    before = answered()
    terms = {"unclaimed_for": timedelta(hours=1), "silent_for": timedelta(seconds=5)}
    wait_until(lambda: store.jobs.resend(**terms), what="the lease's end")
    processes.worker("evaluate", HSCR_MODEL_PATH=MODEL)
    resumed, between = evaluated(job), answered()
    whole = evaluated(submit(store, payload))
    assert between - before == answered() - between - had
    assert (resumed.scores, resumed.reasons) == (whole.scores, whole.reasons)
    wait_until(lambda: not list((store.blobs.root / "checkpoints").iterdir()), what="their removal")


def test_an_evaluation_is_cancelled_although_its_engine_is_silent(
    store: Store, processes: Processes, engine: Engine, tmp_path: Path
) -> None:
    version = scored(store, tmp_path)
    start_agent(processes, engine)
    processes.relay()
    processes.worker("evaluate", HSCR_MODEL_PATH=MODEL)
    many = EVALUATE.model_copy(update={"images": 200})
    payload = EvaluatePayload(candidate=version, score_job="job_scored", evaluate=many)
    job = submit(store, payload)
    wait_until(lambda: any(e.type == "progress" for e in store.jobs.events(job.id)), seconds=90)
    with engine.frozen():
        store.jobs.cancel(job.id)
        assert finished(store, job, seconds=10).state is JobState.CANCELLED
    assert store.releases.evaluations() == []


def test_an_evaluation_without_scores_says_what_to_do(store: Store, processes: Processes) -> None:
    processes.relay()
    processes.worker("evaluate")
    payload = EvaluatePayload(candidate="hscr@000000000000", score_job="job_none", evaluate=EVALUATE)
    ended = finished(store, submit(store, payload))
    assert (ended.error or {})["slug"] == "conflict"
    assert "submit the evaluation again" in (ended.error or {})["remedy"]
