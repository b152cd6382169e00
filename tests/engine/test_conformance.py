"""What every engine behind the gateway must do. Speaks HTTP only, to whatever `engine` started."""

import asyncio
import itertools
import json
import math
from base64 import b64encode
from io import BytesIO
from typing import NamedTuple, Self

import aiohttp
import pytest
from PIL import Image

from hscr.engine import Message
from hscr.errors import EngineRejected
from tests.engine.conftest import ask, png, until
from tests.engine.differences import differs

pytestmark = pytest.mark.anyio

LONG = ask(max_tokens=450)
"""Takes seconds, unless something stops it."""
URL = f"data:image/png;base64,{b64encode(png(0)).decode()}"


async def collect(client, request):
    deltas = [delta async for delta in client.stream(request)]
    return "".join(delta.text for delta in deltas), deltas


async def rejected(call) -> int:
    with pytest.raises(EngineRejected) as refusal:
        await call
    return refusal.value.status


def mixed_requests(count: int, **options):
    """Different lengths, images and no image."""
    questions = (
        "what is shown?",
        "is there a nodule in the left lung?",
        "which organ is shown, and on the right?",
    )
    return [ask(questions[i % 3] * (1 + i % 4), None if i % 5 == 0 else i, **options) for i in range(count)]


async def test_it_is_healthy_and_names_itself(client):
    assert await client.health()
    version = await client.version()
    assert version.version


async def test_it_lists_the_base_model(client, engine):
    (base,) = await client.models()
    assert (base.id, base.parent) == (engine.model, None)


async def test_batched_answers_equal_single_answers(client):
    requests = mixed_requests(24, top=0)
    single = [await client.chat(request) for request in requests]
    batched = await asyncio.gather(*(client.chat(request) for request in requests))
    assert [a.text for a in batched] == [a.text for a in single]
    for one, other in zip(single, batched, strict=True):
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert len({a.text for a in single}) > 12, "the answers must differ for this to mean anything"


async def test_the_image_changes_the_answer(client):
    answers = [await client.chat(ask(image=image, top=0)) for image in (1, 2, None)]
    assert len({answer.logprobs[0].logprob for answer in answers}) == 3


async def test_every_turn_and_the_system_message_are_read(client):
    turns = (Message(role="system", text="answer briefly."), Message(text="which organ?"),
             Message(role="assistant", text="the lung."), Message(text="is it clear?"))  # fmt: skip
    asked = [turns, turns[1:], turns[3:], (*turns[:2], Message(role="assistant", text="no."), turns[3])]
    answers = [await client.chat(ask(top=0).but(messages=messages)) for messages in asked]
    assert len({answer.logprobs[0].logprob for answer in answers}) == 4
    lengths = [answer.usage.prompt_tokens for answer in answers]
    assert lengths[0] > lengths[1] > lengths[2]


async def test_a_jpeg_is_read_as_well_as_a_png(client):
    with Image.open(BytesIO(png(1))) as picture:
        buffer = BytesIO()
        picture.save(buffer, "JPEG")
    png_answer, jpeg_answer = [
        await client.chat(ask(top=0).but(image=data)) for data in (png(1), buffer.getvalue())
    ]
    assert png_answer.usage == jpeg_answer.usage
    assert png_answer.logprobs[0].logprob != jpeg_answer.logprobs[0].logprob, "JPEG changes the noise"


async def test_streamed_text_equals_the_whole(client):
    for request in mixed_requests(6, top=2):
        whole = await client.chat(request)
        text, deltas = await collect(client, request)
        assert text == whole.text
        assert [t.token for d in deltas for t in d.logprobs or ()] == [t.token for t in whole.logprobs]
        assert [d.finish_reason for d in deltas if d.finish_reason] == [whole.finish_reason]
        assert deltas[-1].usage == whole.usage


async def test_a_stream_comes_in_pieces(client):
    _, deltas = await collect(client, LONG)  # vLLM joins what a busy machine has not fetched yet
    assert sum(bool(delta.text) for delta in deltas) >= 4


async def test_the_token_limit_ends_an_answer(client):
    answer = await client.chat(ask(max_tokens=3, top=0))
    assert (answer.finish_reason, answer.usage.completion_tokens, len(answer.logprobs)) == ("length", 3, 3)


async def test_a_seed_repeats_a_sampled_answer_whatever_runs_beside_it(client):
    seeded = {seed: ask(temperature=1.0, top_p=0.95, seed=seed) for seed in range(8)}
    alone = {seed: (await client.chat(request)).text for seed, request in seeded.items()}
    crowd = [
        client.chat(request) for request in [*seeded.values(), *mixed_requests(8, temperature=1.3, seed=5)]
    ]
    together = await asyncio.gather(*crowd)
    assert [answer.text for answer in together[:8]] == list(alone.values())
    assert len(set(alone.values())) > 4


async def test_a_tiny_nucleus_is_greedy(client):
    greedy = await client.chat(ask(temperature=0.0))
    nucleus = await client.chat(ask(temperature=1.0, top_p=1e-6, seed=3))
    assert nucleus.text == greedy.text


async def test_logprobs_are_a_distribution_in_order(client):
    answer = await client.chat(ask(top=20))
    for entry in answer.logprobs:
        values = [logprob for _, logprob in entry.top]
        assert len(values) == 20
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1 + 1e-5
        assert entry.logprob == pytest.approx(values[0], abs=1e-6), "greedy takes the most probable"


async def test_logprobs_do_not_depend_on_temperature(client):
    greedy, hot = [await client.chat(ask(top=20, temperature=t, seed=11)) for t in (0.0, 1.7)]
    assert dict(hot.logprobs[0].top) == pytest.approx(dict(greedy.logprobs[0].top), abs=1e-4)


async def test_without_asking_there_are_no_logprobs(client):
    assert (await client.chat(ask())).logprobs is None


async def test_stop_strings_never_show_even_across_tokens(client):
    cases = 0
    for image in range(6):
        whole = await client.chat(ask(image=image, max_tokens=40, top=0))
        for stop in [stop for stop in across_tokens(whole.logprobs) if stop in whole.text][:3]:
            expected = whole.text[: whole.text.index(stop)]
            request = ask(image=image, max_tokens=40, stop=("never to be seen", stop))
            answer = await client.chat(request)
            assert (answer.text, answer.finish_reason) == (expected, "stop")
            assert (await collect(client, request))[0] == expected
            cases += 1
    assert cases >= 4, "too few token borders in plain text"


def across_tokens(logprobs) -> list[str]:
    """Strings of four characters that begin in one token and end in the next."""
    tokens = [entry.token for entry in logprobs]
    pairs = itertools.pairwise(tokens)
    return [a[-2:] + b[:2] for a, b in pairs if len(a) > 1 < len(b) and "\ufffd" not in a + b]


async def test_an_unfinished_stop_string_is_given_out_at_the_end(client):
    whole = await client.chat(ask())
    assert (await client.chat(ask(stop=(whole.text[-3:] + "and something else",)))).text == whole.text


async def test_a_client_that_leaves_stops_its_request(client, engine):
    before = Ended.so_far(engine)
    stream = client.stream(LONG)
    await anext(stream)
    await asyncio.to_thread(until, lambda: not idle(engine))
    await stream.aclose()
    await asyncio.to_thread(until, lambda: idle(engine))
    assert_aborted(engine, before)


async def test_a_client_that_leaves_before_the_whole_answer_stops_its_request(client, engine):
    before = Ended.so_far(engine)
    call = asyncio.create_task(client.chat(LONG))
    await asyncio.to_thread(until, lambda: not idle(engine))
    call.cancel()
    await asyncio.to_thread(until, lambda: idle(engine))
    assert_aborted(engine, before)


class Ended(NamedTuple):
    """Requests that ended, and those of them that were broken off."""

    all: float
    aborted: float

    @classmethod
    def so_far(cls, engine) -> Self:
        name = "vllm:request_success_total"
        return cls(engine.metric(name), engine.metric(name, finished_reason="abort"))


def idle(engine) -> bool:
    return engine.metric("vllm:num_requests_running") == 0


def assert_aborted(engine, before: Ended) -> None:
    """One request was broken off since, and none went on to its end."""
    counted = 0 if differs(engine, "does not count aborted requests") else 1
    assert Ended.so_far(engine) == Ended(before.all + counted, before.aborted + counted)


async def test_adapters_are_listed_under_their_parent_and_answer(client, engine, adapters):
    base = await client.chat(ask())
    await client.load_adapter("a", adapters[0])
    await client.load_adapter("b", adapters[1])
    listed = {model.id: (model.parent, model.root) for model in await client.models()}
    assert listed["a"] == (engine.model, str(adapters[0]))
    assert listed["b"] == (engine.model, str(adapters[1]))
    answers = [await client.chat(ask(model=name)) for name in ("a", "b")]
    assert [answer.model for answer in answers] == ["a", "b"]
    assert len({base.text, *(answer.text for answer in answers)}) == 3
    assert await client.chat(ask()) == base


async def test_adapters_in_one_batch_do_not_mix(client, adapters):
    await client.load_adapter("a", adapters[0])
    await client.load_adapter("b", adapters[1])
    requests = [ask(image=i, model=name, max_tokens=8 + i) for i in range(6) for name in ("a", "b", "tiny")]
    alone = [(await client.chat(request)).text for request in requests]
    together = await asyncio.gather(*(client.chat(request) for request in requests))
    assert [answer.text for answer in together] == alone


async def test_the_base_stays_itself_after_more_adapters_than_there_is_room_for(client, adapters):
    before = await client.chat(ask(top=3))
    for folder in (*adapters, adapters[0]):
        await client.load_adapter("passing", folder)
        assert (await client.chat(ask(model="passing"))).text != before.text
        await client.unload_adapter("passing")
        assert await client.chat(ask(top=3)) == before


async def test_a_used_name_is_refused_and_keeps_its_weights(client, engine, adapters):
    await client.load_adapter("a", adapters[0])
    before = await client.chat(ask(model="a"))
    assert await rejected(client.load_adapter("a", adapters[1])) == 400
    assert await rejected(client.load_adapter(engine.model, adapters[1])) == 400
    assert await client.chat(ask(model="a")) == before


async def test_unknown_names_are_not_found(client, adapters, tmp_path):
    assert await rejected(client.chat(ask(model="nobody"))) == 404
    assert await rejected(client.chat(ask(model=str(adapters[0])))) == 404, "a path is no name"
    assert await rejected(client.unload_adapter("nobody")) == 404
    assert await rejected(client.load_adapter("a", tmp_path / "nothing")) == 404


async def test_a_request_under_way_keeps_its_adapter(client, adapters):
    await client.load_adapter("a", adapters[0])
    request = ask(model="a", max_tokens=200)
    expected = await client.chat(request)
    pieces = []
    async for delta in client.stream(request):
        if not pieces:
            await client.unload_adapter("a")
            assert await rejected(client.chat(ask(model="a"))) == 404
            assert [model.id for model in await client.models()] == ["tiny"]
            await client.load_adapter("a", adapters[1])
        pieces.append(delta.text)
    assert "".join(pieces) == expected.text
    assert (await client.chat(request)).text != expected.text, "the name now means other weights"


async def test_loading_and_unloading_under_load_fails_nothing(client, adapters):
    expected = {i: (await client.chat(ask(image=i, max_tokens=30))).text for i in range(4)}
    running = [asyncio.create_task(client.chat(ask(image=i % 4, max_tokens=30))) for i in range(40)]
    for _ in range(5):
        await client.load_adapter("a", adapters[2])
        await client.unload_adapter("a")
    answers = await asyncio.gather(*running)
    assert [answer.text for answer in answers] == [expected[i % 4] for i in range(40)]


BAD_BODIES = {
    "no JSON": b"{",
    "no messages": {"messages": []},
    "an unknown role": {"messages": [{"role": "ghost", "content": "hello"}]},
    "a hot temperature": {"temperature": 3.5},
    "no token": {"max_tokens": 0},
    "more tokens than the context": {"max_tokens": 100_000},
    "several answers": {"n": 2.5},
    "too many alternatives": {"logprobs": True, "top_logprobs": 500},
    "a question beyond the context": {"messages": [{"role": "user", "content": "lung " * 20_000}]},
    "bytes that are no image": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "what is this?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}},
                ],
            }
        ]
    },
}


async def test_a_refused_stream_has_a_status_and_no_frame(client):
    for request, status in ((ask(model="nobody"), 404), (ask(max_tokens=1000), 400)):
        assert await rejected(anext(client.stream(request))) == status


REFUSED_PICTURES = {
    "an image to fetch": ["http://127.0.0.1:{port}/picture.png"],
    "a file": ["file:///etc/hostname"],
    "two images": [URL, URL],
}


@pytest.mark.parametrize("case", REFUSED_PICTURES)
async def test_pictures_are_refused_and_nothing_is_fetched(engine, case):
    visitors = []
    server = await asyncio.start_server(lambda _, writer: visitors.append(writer.close()), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    parts = [
        {"type": "image_url", "image_url": {"url": url.format(port=port)}} for url in REFUSED_PICTURES[case]
    ]
    content = [*parts, {"type": "text", "text": "what is this?"}]
    async with server:
        status, _ = await post(engine, {"messages": [{"role": "user", "content": content}]})
    assert status == (500 if "file" in case and differs(engine, "answers a file's URL with 500") else 400)
    assert visitors == []


@pytest.mark.parametrize("case", BAD_BODIES)
async def test_bad_requests_get_an_error_object(engine, client, case):
    status, reply = await post(engine, BAD_BODIES[case])
    if "role" in case and differs(engine, "accepts any role"):
        assert status == 200
        return
    error = reply["error"]
    assert status == 400
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"] == 400
    assert (await client.chat(ask(max_tokens=1))).finish_reason == "length", "it goes on serving"


async def post(engine, change: dict | bytes) -> tuple[int, dict]:
    """A good request with this change, or these bytes instead of one."""
    good = {
        "model": engine.model,
        "messages": [{"role": "user", "content": "what is shown?"}],
        "max_tokens": 2,
    }
    body = change if isinstance(change, bytes) else json.dumps(good | change).encode()
    async with (
        aiohttp.ClientSession(headers={"Content-Type": "application/json"}) as session,
        session.post(f"{engine.address}/v1/chat/completions", data=body) as response,
    ):
        return response.status, await response.json()


async def test_frames_are_openais(engine, client):
    body = ask(max_tokens=3).body(stream=True)
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{engine.address}/v1/chat/completions", json=body) as response,
    ):
        lines = (await response.text()).split("\n\n")
    assert response.content_type == "text/event-stream"
    assert lines[-2:] == ["data: [DONE]", ""]
    frames = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert {frame["object"] for frame in frames} == {"chat.completion.chunk"}
    assert len({frame["id"] for frame in frames}) == 1
    assert frames[0]["choices"][0]["delta"]["role"] == "assistant"
    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"]["total_tokens"] == sum(
        frames[-1]["usage"][k] for k in ("prompt_tokens", "completion_tokens")
    )


async def test_metrics_tell_the_load(engine, client):
    await client.chat(ask(max_tokens=2))
    names = {name.split("{")[0] for name in engine.metrics()}
    assert names >= {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:time_to_first_token_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:lora_requests_info",
    }
