"""Questions and captions: the whole path to the engine and into the store."""

import json
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from hscr.store.blobs import bytes_digest
from tests.service.conftest import IMAGE, QUESTION, VERSIONS, b64, chat_body

A, B = VERSIONS
SHORT = {"max_tokens": 8}


def test_an_answer_is_kept_with_its_whole_provenance(gateway, store):
    gateway.serve_version(A)
    reply = gateway.ask(sampling={"max_tokens": 8, "seed": 3})
    assert reply.status_code == 200, reply.text
    told = reply.json()
    kept = store.answers.get(told["id"])
    assert kept.model_dump(mode="json") == {k: v for k, v in told.items() if k != "notice"}
    assert "Research use only" in told["notice"]
    made = kept.provenance
    assert (made.adapter, made.adapter_digest) == (A, store.releases.adapter(A).digest)
    assert (made.model, made.model_digest, made.template_digest) == ("tiny", "m" * 64, "t" * 64)
    assert (made.engine, made.numeric_mode) == ("embedded/0.1.0", "cpu/float32")
    assert made.sampling.seed == 3
    assert made.recipe == kept.image.recipe
    assert kept.image.source_digest == bytes_digest(IMAGE)
    assert bytes_digest(store.blobs.get(kept.image.digest)) == kept.image.digest


def test_each_version_answers_in_its_own_words(gateway):
    gateway.serve_version(A)
    gateway.serve_version(B)
    texts = {name: gateway.answered(adapter=name).text for name in ("base", A, B, "active")}
    assert len({texts["base"], texts[A], texts[B]}) == 3
    assert texts["active"] == texts[B]
    assert gateway.answered(adapter="tiny").text == texts["base"]
    assert gateway.answered().text == texts[B]
    gateway.post("/v1/adapters/rollback", {"reason": "test"})
    gateway.epoch_seen()
    assert gateway.answered().text == texts[A]


def test_an_unknown_adapter_and_one_that_is_not_loaded_are_told_apart(gateway):
    unknown = gateway.ask(adapter="hscr@000000000000")
    assert (unknown.status_code, unknown.json()["type"]) == (404, "/problems/not-found")
    unloaded = gateway.ask(adapter=A)
    assert (unloaded.status_code, unloaded.json()["type"]) == (409, "/problems/conflict")
    assert "GET /v1/models" in unloaded.json()["remedy"]


def test_a_form_and_a_body_are_the_same_question(gateway):
    form = {"question": QUESTION, "sampling": json.dumps(SHORT), "study": "s-1"}
    sent = gateway.request("POST", "/v1/vqa", data=form, files={"image": ("Doe^Jane.png", IMAGE)})
    assert sent.status_code == 200, sent.text
    direct = gateway.answered(study="s-1")
    kept = gateway.store.answers.get(sent.json()["id"])
    same = {"text", "question", "image", "provenance", "study", "finish_reason"}
    assert kept.model_dump(include=same) == direct.model_dump(include=same)
    assert "Jane" not in kept.model_dump_json()


def test_a_caption_uses_the_models_prompt_unless_told_otherwise(gateway):
    image = {"image": b64(IMAGE), "sampling": SHORT}
    default = gateway.post("/v1/captions", image).json()
    assert (default["kind"], default["question"]) == ("caption", "Describe this image.")
    asked = gateway.post("/v1/captions", image | {"prompt": "Write a caption for this image."}).json()
    assert asked["question"] == "Write a caption for this image."


def test_dicom_names_its_recipe_and_hides_its_study(gateway):
    data = Path(get_testdata_file("CT_small.dcm")).read_bytes()
    first, second = gateway.answered(image=data), gateway.answered(image=data)
    assert first.image.media_type == "application/dicom"
    assert first.image.modality == "CT"
    assert first.provenance.recipe.name.startswith("dicom-")
    assert first.study == second.study
    assert first.study.startswith("study_")
    url = f"data:application/dicom;base64,{b64(data)}"
    chat = gateway.post("/v1/chat/completions", chat_body(url=url))
    assert gateway.store.answers.get(chat.json()["id"]).image == first.image


def test_a_stream_adds_up_to_the_kept_answer(gateway, store):
    whole = gateway.answered().text
    with gateway.stream("/v1/vqa", {"image": b64(IMAGE), "question": QUESTION, "sampling": SHORT}) as events:
        told = []
        for event, data, _ in events:
            told.append((event, json.loads(data)))
            if event == "answer":
                # Committed before the client is told.
                assert store.answers.get(told[-1][1]["id"]).text == whole
    assert [event for event, _ in told] == ["delta"] * (len(told) - 1) + ["answer"]
    assert len(told) > 3
    assert "".join(data["text"] for event, data in told if event == "delta") == whole


def test_chat_speaks_openai(gateway, store):
    gateway.serve_version(A)
    direct = gateway.answered(adapter=A)
    reply = gateway.post("/v1/chat/completions", chat_body(model=A)).json()
    assert reply["object"] == "chat.completion"
    assert reply["model"] == A
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": direct.text}
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    kept = store.answers.get(reply["id"])
    assert (kept.kind, kept.question, kept.provenance.adapter) == ("chat", QUESTION, A)


def test_a_chat_stream_speaks_openai(gateway, store):
    direct = gateway.answered()
    body = chat_body(stream=True, stream_options={"include_usage": True})
    with gateway.stream("/v1/chat/completions", body) as events:
        frames = [data for _, data, _ in events]
    assert frames[-1] == "[DONE]"
    chunks = [json.loads(frame) for frame in frames[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert deltas[0]["delta"]["role"] == "assistant"
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == direct.text
    assert deltas[-1]["finish_reason"] == direct.finish_reason
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert {chunk["model"] for chunk in chunks} == {"tiny"}
    assert store.answers.get(chunks[0]["id"]).text == direct.text


def test_a_conversation_is_kept_whole(gateway, store):
    body = chat_body()
    body["messages"] += [
        {"role": "assistant", "content": "no."},
        {"role": "user", "content": "is the right lung clear?"},
    ]
    kept = store.answers.get(gateway.post("/v1/chat/completions", body).json()["id"])
    assert kept.question == f"user: {QUESTION}\nassistant: no.\nuser: is the right lung clear?"


def test_models_are_what_a_request_may_name(gateway):
    gateway.serve_version(A)
    gateway.serve_version(B)
    models = {model["id"]: model for model in gateway.get("/v1/models").json()["data"]}
    assert set(models) == {"tiny", A, B}
    assert [models[B]["active"], models[A]["active"], models[A]["previous"]] == [True, False, True]
    assert models[A]["parent"] == "tiny"
    assert {model["intended_use"] for model in models.values()} == {"Tests of this project."}
    assert all(gateway.ask(adapter=name).status_code == 200 for name in models)


@pytest.mark.parametrize("options", [{}, {"stream": True}])
def test_a_refusal_before_the_first_text_has_its_own_status(gateway, options):
    """The tiny model reads 512 tokens at most; the engine says so, and nothing is kept."""
    reply = gateway.ask(question="z7" * 900, **options)
    assert (reply.status_code, reply.json()["type"]) == (422, "/problems/invalid-input")
    assert gateway.store.answers.page() == []


def test_answers_are_listed_page_by_page(gateway):
    made = [gateway.answered().id for _ in range(3)]
    first = gateway.get("/v1/answers", params={"limit": 2}).json()
    rest = gateway.get("/v1/answers", params={"limit": 2, "before": first["next_before"]}).json()
    assert [answer["id"] for answer in first["data"] + rest["data"]] == made[::-1]
    assert rest["next_before"] is None
    assert gateway.get(f"/v1/answers/{made[0]}").json()["id"] == made[0]
