"""An answer's visual dependence by the engine that serves: real workers, a real engine, real HTTP."""

import io
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from PIL import Image

from hscr.contrast.dependence import Said, dropped_views, visual_dependence
from hscr.errors import Gone
from hscr.models.digest import model_digest
from hscr.models.phantom.anatomy import render
from hscr.models.phantom.data import TRAFFIC, sample_examples
from hscr.models.vlm import VLM
from hscr.records import (
    AdapterVersion,
    Answer,
    AnswerKind,
    Dropping,
    Job,
    JobState,
    Provenance,
    Recipe,
    Sampling,
    VisualDependence,
)
from hscr.records import Image as ImageRecord
from hscr.store.store import Store
from tests.serving import EngineProcess
from tests.waiting import wait_until
from tests.workers.engines import loaded, probe, register, start_agent
from tests.workers.harness import Processes, finished, make_adapter, submit, succeeded
from workers.contract import ScoreAnswerPayload
from workers.gpu_work import Workbench
from workers.settings import EMBEDDED_MODEL

MODEL = str(EMBEDDED_MODEL)
RECIPE = Recipe(name="raster@1", digest="r" * 64)
TOLERANCE = 1e-3
"""in nats, in fp32"""


@pytest.fixture(scope="module", params=["embedded", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest) -> EngineProcess:
    """Each kind in turn."""
    return request.getfixturevalue(f"phantom_{request.param}")


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM.load(EMBEDDED_MODEL)


@pytest.fixture
def scorer(processes: Processes, engine: EngineProcess) -> Processes:
    """Everything that a score needs, started."""
    start_agent(processes, engine)
    processes.relay()
    processes.worker("score", HSCR_MODEL_PATH=MODEL)
    return processes


def examples(number: int) -> list[tuple[bytes, str, str]]:
    """Pictures of phantoms, each with a question and its true answer."""
    found = []
    for example in sample_examples(TRAFFIC, "traffic", number, 0, 1):
        buffer = io.BytesIO()
        render(example.phantom).save(buffer, "PNG")
        found.append((buffer.getvalue(), example.question, example.answer))
    return found


def answered(
    store: Store, png: bytes, question: str, text: str, version: AdapterVersion | None = None, **more: Any
) -> Answer:
    """A kept answer, as the gateway would have kept it."""
    digest, model = store.blobs.put(png), model_digest(EMBEDDED_MODEL)
    image = ImageRecord(
        digest=digest, source_digest=digest, width=8, height=8, media_type="image/png", recipe=RECIPE
    )
    made = {
        "model": "base",
        "model_digest": model,
        "adapter": version and version.name,
        "adapter_digest": version and version.digest,
        "recipe": RECIPE,
        "template_digest": "t",
        "sampling": Sampling(),
        "numeric_mode": "cpu/float32",
        "engine": "embedded/0",
    } | more
    answer = Answer(
        kind=AnswerKind.VQA, study=f"study-{digest[:8]}", image=image, question=question, text=text,
        finish_reason="stop", provenance=Provenance.model_validate(made),
    )  # fmt: skip
    return store.answers.add(answer, image_ttl=timedelta(hours=1))


def scored(store: Store, answer: Answer) -> VisualDependence:
    job = succeeded(store, submit(store, ScoreAnswerPayload(answer_id=answer.id)), seconds=120)
    found = store.answers.dependence(answer.id)
    assert found is not None
    assert job.result == {"answer": answer.id, "visual_dependence": found.score}
    assert found.job_id == job.id
    return found


def picture(store: Store, answer: Answer) -> Image.Image:
    return Image.open(io.BytesIO(store.blobs.get(answer.image.digest)))


def by_the_model(vlm: VLM, store: Store, answer: Answer, adapter: str | None) -> float:
    said = Said(answer.image.digest, picture(store, answer), answer.question, answer.text)
    (value,) = visual_dependence(vlm, [said], adapter=adapter, mode="zero")
    return value


@torch.no_grad()
def differences(vlm: VLM, store: Store, answer: Answer) -> list[float]:
    """Of each token, in the base model."""
    digest = answer.image.digest
    (tokens,) = vlm.encode({digest: picture(store, answer)}).values()
    views = [tokens, *dropped_views(tokens, digest, **Dropping().model_dump())]
    context = vlm.prefill(vlm.embed([vlm.prompt_ids(answer.question)] * len(views), views))
    text = [[vlm.completion_ids(answer.text)]] * len(views)
    full, *dropped = [row for (row,) in vlm.completion_logprobs(context, text)]
    return (full - torch.stack(dropped).mean(0))[:-1].tolist()


def test_the_engine_scores_as_the_model_itself(
    store: Store, scorer: Processes, vlm: VLM, tmp_path: Path
) -> None:
    folder = make_adapter(EMBEDDED_MODEL, tmp_path / "a", seed=1, scale=0.05)
    version = register(store, EMBEDDED_MODEL, folder, probe(EMBEDDED_MODEL, folder))
    vlm.load_adapter(folder, version.name)
    scores = []
    for png, question, text in examples(3):
        for served in (None, version):
            answer = answered(store, png, question, text, served)
            found = scored(store, answer)
            expected = by_the_model(vlm, store, answer, served and served.name)
            assert found.score == pytest.approx(expected, abs=TOLERANCE)
            assert (found.adapter, found.adapter_digest) == (
                served and served.name,
                served and served.digest,
            )
            scores.append(found.score)
            if served is None:
                each = [token.difference for token in found.tokens]
                assert each == pytest.approx(differences(vlm, store, answer), abs=TOLERANCE)
    assert len({round(score, 2) for score in scores}) > 3, "scores must differ for this to mean anything"
    wait_until(lambda: loaded(store) == (), seconds=30, what="the version being unloaded after its scores")


def test_a_result_says_what_it_is(store: Store, scorer: Processes, engine: EngineProcess, vlm: VLM) -> None:
    (example,) = examples(1)
    answer = answered(store, *example)
    found = scored(store, answer)
    assert found.dropping == Dropping(mode="zero", rate=0.7, masks=8, seed=0)
    assert found.model_digest == vlm.digest
    assert (found.numeric_mode, found.vision_numeric_mode) == ("cpu/float32", "cpu/float32")
    assert found.engine.startswith(f"{engine.kind}/")
    ids = vlm.completion_ids(answer.text)[:-1]
    assert [token.text for token in found.tokens] == [vlm.tokenizer.decode([token]) for token in ids]
    content = [token for token in found.tokens if token.content]
    assert 0 < len(content) < len(found.tokens), "a full stop does not count"
    assert found.score == pytest.approx(fmean(token.full - token.dropped for token in content))
    again = scored(store, answer)
    assert again.score == pytest.approx(found.score, abs=1e-5)
    assert again.job_id != found.job_id


def refused(store: Store, answer: Answer) -> dict[str, str]:
    ended: Job = finished(store, submit(store, ScoreAnswerPayload(answer_id=answer.id)), seconds=90)
    assert ended.state is JobState.FAILED
    assert store.answers.dependence(answer.id) is None
    return ended.error or {}


def test_what_cannot_be_scored_says_why(store: Store, scorer: Processes) -> None:
    (png, question, text), (other, *_) = examples(2)
    expired = answered(store, png, question, text)
    store.blobs.delete(expired.image.digest)
    assert refused(store, expired)["slug"] == "gone"
    foreign = answered(store, other, question, text, model_digest="f" * 64)
    assert refused(store, foreign)["slug"] == "conflict"
    assert "another base model than this worker" in refused(store, foreign)["detail"]


def test_a_study_deleted_meanwhile_keeps_no_result(store: Store, scorer: Processes) -> None:
    (example,) = examples(1)
    answer = answered(store, *example)
    scored(store, answer)
    store.preferences.delete_study(answer.study, "key_1")
    assert store.answers.dependence(answer.id) is None
    ended = finished(store, submit(store, ScoreAnswerPayload(answer_id=answer.id)), seconds=90)
    assert (ended.error or {})["slug"] == "gone"


def test_a_result_of_a_deleted_study_is_not_written(store: Store) -> None:
    from hscr.store.answers import add_answer_dependence

    (example,) = examples(1)
    answer = answered(store, *example)
    found = VisualDependence(
        answer_id=answer.id, score=0.0, tokens=(), dropping=Dropping(), model_digest="m", adapter=None,
        adapter_digest=None, numeric_mode="cpu/float32", vision_numeric_mode="cpu/float32", engine="e",
        job_id="job_1",
    )  # fmt: skip
    store.preferences.delete_study(answer.study, "key_1")
    with pytest.raises(Gone), store.database.write() as connection:
        add_answer_dependence(connection, found)
    assert store.answers.dependence(answer.id) is None


def test_seeing_loads_no_language_model(store: Store, tmp_path: Path) -> None:
    class Channel:
        def send(self, event: str, **data: Any) -> None:
            raise AssertionError(event)

        def stopped(self) -> bool:
            return False

    ((png, question, text),) = examples(1)
    bench = Workbench(EMBEDDED_MODEL, "cpu", "float32", store.blobs, 1)
    arguments = {"image": store.blobs.put(png), "question": question, "text": text, "out": str(tmp_path)}
    seen = bench.run("see", arguments | {"dropping": Dropping(masks=2).model_dump()}, Channel())
    assert "vlm" not in vars(bench), "the whole model was loaded"
    whole, *dropped = [torch.load(tmp_path / name, weights_only=True) for name in seen["files"]]
    assert len(dropped) == 2
    assert len(whole) == seen["rows"] == seen["prompt"].count(seen["image_token"])
    for shown in dropped:
        empty = (shown == 0).all(-1)
        assert int(empty.sum()) == round(0.7 * len(whole))
        assert torch.equal(shown[~empty], whole[~empty])
    assert not torch.equal(*dropped)
    assert all((tmp_path / name).stat().st_size < whole.nbytes + 4096 for name in seen["files"])
