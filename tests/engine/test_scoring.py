"""A given answer scored by the engine that serves: by image, by its visual tokens, and by fewer of them."""

import asyncio
import io
from typing import Any

import pytest
import torch
from PIL import Image

from hscr.contrast.degrade import degrade
from hscr.engine import ChatRequest, Expected, Message, VisualTokens
from hscr.errors import EngineError, EngineRejected, InvalidInput
from hscr.records import Sampling
from tests.engine.conftest import ask, png
from tests.engine.differences import differs

pytestmark = pytest.mark.anyio

QUESTION = "is there a nodule in the left lung?"
ANSWER = "yes, there is a small nodule in the left lung."
TOLERANCE = {"embedded": 1e-4, "vllm": 1e-3}
"""in nats, in fp32"""
MIXED = 1e-2
"""in nats: less than what another image, mask or adapter changes"""


@pytest.fixture
def kind(engine) -> str:
    """Which engine this is."""
    return engine.kind


def saved(tokens: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tokens.clone(), buffer)
    return buffer.getvalue()


def seen(vlm, image: int = 0) -> torch.Tensor:
    """[N, d] visual tokens of a picture."""
    with Image.open(io.BytesIO(png(image))) as picture:
        return vlm.visual_tokens(vlm.pixel_values([picture]))[0]


def zeroed(tokens: torch.Tensor, mask: int) -> torch.Tensor:
    return degrade(tokens, 0.7, "zero", "key", mask).tokens


def given(
    image: bytes | torch.Tensor | None,
    *,
    question: str = QUESTION,
    answer: str = ANSWER,
    model: str = "tiny",
    rows: int | None = None,
) -> ChatRequest:
    if isinstance(image, torch.Tensor):
        image = VisualTokens(data=saved(image), rows=rows or len(image))
    messages = (Message(text=question), Message(role="assistant", text=answer))
    return ChatRequest(model=model, messages=messages, image=image)


def expected(vlm, question: str = QUESTION, answer: str = ANSWER, *, rows: int | None = None) -> Expected:
    ids, token = vlm.prompt_ids(question), vlm.image_token_id
    at, count = ids.index(token), rows or vlm.image_token_count
    prompt = [*ids[:at], *[token] * count, *ids[at + 1 :]]
    return Expected(prompt=prompt, answer=vlm.completion_ids(answer)[:-1], image_token=token)


def own(
    vlm, tokens: torch.Tensor, question: str = QUESTION, answer: str = ANSWER, *, adapter: str | None = None
) -> list[float]:
    """What hscr's own model says of the answer's tokens, its end left out."""
    with vlm.use(adapter), torch.no_grad():
        context = vlm.prefill(vlm.embed([vlm.prompt_ids(question)], [tokens]))
        ((logprobs,),) = vlm.completion_logprobs(context, [[vlm.completion_ids(answer)]])
    return logprobs[:-1].tolist()


async def test_a_given_answer_is_scored_as_by_the_model_itself(client, vlm, kind):
    scores = []
    for image, question, answer in (
        (0, QUESTION, ANSWER),
        (1, "which organ is shown, and on the right?", "no."),
        (2, "what?", "a large effusion – 3 × 4 cm – on the right."),
    ):
        score = await client.score(
            given(png(image), question=question, answer=answer), expected(vlm, question, answer)
        )
        assert score == pytest.approx(own(vlm, seen(vlm, image), question, answer), abs=TOLERANCE[kind])
        scores.append(score)
    assert len({score[0] for score in scores}) == 3


async def test_visual_tokens_equal_their_image(client, vlm, kind):
    by_image = await client.score(given(png(3)), expected(vlm))
    by_tokens = await client.score(given(seen(vlm, 3)), expected(vlm))
    assert by_tokens == pytest.approx(by_image, abs=TOLERANCE[kind])
    assert by_tokens != pytest.approx(await client.score(given(png(4)), expected(vlm)), abs=1e-2)


async def test_visual_tokens_answer_as_their_image(client, vlm):
    sampling = Sampling(max_tokens=12)
    asked = [
        ChatRequest.ask("tiny", QUESTION, image, sampling=sampling)
        for image in (png(5), VisualTokens(data=saved(seen(vlm, 5)), rows=vlm.image_token_count))
    ]
    by_image, by_tokens = [await client.chat(request) for request in asked]
    assert by_tokens.text == by_image.text
    assert by_tokens.usage == by_image.usage


async def test_zeroed_rows_score_as_in_the_model_itself(client, vlm, kind):
    tokens = seen(vlm)
    scores = []
    for mask in range(3):
        shown = zeroed(tokens, mask)
        assert int((shown.abs().sum(-1) == 0).sum()) == round(0.7 * len(tokens))
        scores.append(await client.score(given(shown), expected(vlm)))
        assert scores[-1] == pytest.approx(own(vlm, shown), abs=TOLERANCE[kind])
    full = await client.score(given(tokens), expected(vlm))
    assert len({score[0] for score in [full, *scores]}) == 4, "each mask must change the score"


async def test_an_adapter_scores_with_its_own_weights(client, vlm, adapters, kind):
    await client.load_adapter("a", adapters[0])
    vlm.load_adapter(adapters[0], "reference")
    try:
        for shown in (seen(vlm), zeroed(seen(vlm), 0)):
            score = await client.score(given(shown, model="a"), expected(vlm))
            assert score == pytest.approx(own(vlm, shown, adapter="reference"), abs=TOLERANCE[kind])
            assert score != pytest.approx(own(vlm, shown), abs=1e-2)
    finally:
        vlm.unload_adapter("reference")


async def test_scores_answers_images_and_adapters_run_together(client, vlm, adapters):
    """In one step. vLLM dies of this unless it keeps its head out of LoRA (`--lora-target-modules`)."""
    await client.load_adapter("a", adapters[0])
    vlm.load_adapter(adapters[0], "reference")
    alone = [(await client.chat(ask(image=i, max_tokens=20))).text for i in range(4)]
    shown = [seen(vlm, i) if i % 3 else zeroed(seen(vlm, i), i) for i in range(12)]
    requests = [
        given(png(i) if i % 3 == 2 else tokens, model=("tiny", "a")[i % 2]) for i, tokens in enumerate(shown)
    ]
    try:
        answers = [client.chat(ask(image=i % 4, max_tokens=20)) for i in range(12)]
        scores = [client.score(request, expected(vlm)) for request in requests]
        found = await asyncio.gather(*answers, *scores)
        assert [answer.text for answer in found[:12]] == alone * 3
        for i, (score, tokens) in enumerate(zip(found[12:], shown, strict=True)):
            own_scores = own(vlm, tokens, adapter=(None, "reference")[i % 2])
            assert score == pytest.approx(own_scores, abs=MIXED)
    finally:
        vlm.unload_adapter("reference")


async def test_half_precision_is_read_as_the_numbers_it_holds(client, vlm, kind):
    tokens = seen(vlm).to(torch.bfloat16)
    score = await client.score(given(tokens), expected(vlm))
    assert score == pytest.approx(own(vlm, tokens.float()), abs=TOLERANCE[kind])


async def test_fewer_rows_are_refused_here_and_are_a_difference_between_engines(client, engine, vlm):
    kept = degrade(seen(vlm), 0.7, "delete", "key", 0).tokens
    with pytest.raises(InvalidInput, match=f"{len(kept)} visual tokens cannot stand for an image"):
        await client.score(given(kept), expected(vlm))
    asked = client.score(given(kept), expected(vlm, rows=len(kept)))
    if differs(engine, "takes any number of visual tokens"):
        assert await asked == pytest.approx(own(vlm, kept), abs=TOLERANCE[engine.kind])
    else:
        with pytest.raises(EngineRejected, match="has shape"):
            await asked


async def test_rows_that_are_counted_wrong_are_never_scored(client, vlm):
    """Whoever states a number that is not that of the bytes."""
    kept = seen(vlm)[:5]
    with pytest.raises(EngineError):
        await client.score(given(kept, rows=vlm.image_token_count), expected(vlm))


async def test_other_tokens_than_expected_are_an_error(client, vlm):
    for other in (
        expected(vlm, answer="yes, there is a small nodule in the left lung"),
        expected(vlm, question="is there a nodule in the right lung?"),
        expected(vlm).but(prompt=expected(vlm).prompt[1:]),
    ):
        with pytest.raises(EngineError, match="read other tokens than expected"):
            await client.score(given(seen(vlm)), other)


class Payload:
    """What a pickle runs when it is not asked to load weights only."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never run",))


def unusable(vlm) -> dict[str, bytes]:
    tokens = seen(vlm)
    wide = torch.cat([tokens, tokens], dim=1)
    return {
        "another hidden size": saved(wide),
        "one dimension": saved(tokens[0]),
        "no tensor": saved_object({"tokens": "none"}),
        "code": saved_object(Payload()),
        "no archive": b"hello",
        "half an archive": saved(tokens)[:-40],
    }


def saved_object(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


async def test_what_is_no_visual_tokens_is_refused_and_harms_nobody(client, engine, vlm):
    refusal = EngineError if differs(engine, "answers unreadable visual tokens with 500") else EngineRejected
    before = await client.score(given(seen(vlm)), expected(vlm))
    for data in unusable(vlm).values():
        image = VisualTokens(data=data, rows=vlm.image_token_count)
        with pytest.raises(refusal):
            await client.score(given(None).but(image=image), expected(vlm))
    assert await client.score(given(seen(vlm)), expected(vlm)) == pytest.approx(before, abs=1e-6)


async def test_an_image_and_visual_tokens_do_not_mix(client, vlm):
    request = given(seen(vlm))
    body = request.body()
    body["messages"][0]["content"] += given(png(1)).body()["messages"][0]["content"][:1]
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_embeds", "text", "image_url"]
    status, reply = await post(client.address, body)
    assert (status, reply["error"]["code"]) == (400, 400)


async def test_prompt_logprobs_have_vllms_shape(client, vlm):
    body = given(seen(vlm)).body() | {
        "prompt_logprobs": 1,
        "add_generation_prompt": False,
        "continue_final_message": True,
        "max_tokens": 1,
    }
    status, reply = await post(client.address, body)
    assert status == 200
    first, *places = reply["prompt_logprobs"]
    assert first is None
    assert len(places) + 1 == reply["usage"]["prompt_tokens"]
    ids = [*expected(vlm).prompt, *expected(vlm).answer]
    assert [int(next(iter(place))) for place in places] == ids[1:]
    for place in places:
        assert 1 <= len(place) <= 2
        ranks = [entry["rank"] for entry in place.values()]
        assert 1 in ranks, "the most probable is among them"
        assert len(set(ranks)) == len(place)
        assert all(entry.keys() >= {"logprob", "rank", "decoded_token"} for entry in place.values())


def test_an_answer_has_tokens() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Expected(prompt=(1, 3, 5), answer=(), image_token=3)


async def post(address: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    import aiohttp

    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{address}/v1/chat/completions", json=body) as reply,
    ):
        return reply.status, await reply.json()
