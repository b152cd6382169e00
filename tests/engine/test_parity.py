"""Served answers are the model's own: each engine against transformers and PEFT alone."""

from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hscr.engine import ChatRequest, EngineClient
from hscr.models.vlm import VLM
from hscr.records import Sampling
from hscr.stack import PHANTOM
from tests.engine.conftest import ENGINES, save_adapter
from tests.engine.differences import differs
from tests.serving import EngineProcess

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks transformers
]

STEPS = 64
TOP = 5
VERSIONS = {"hscr@aaaaaaaaaaaa": 11, "hscr@bbbbbbbbbbbb": 12}
"""Names of two adapters and the seeds of their weights."""


@dataclass(frozen=True)
class Case:
    """An image request. The sizes need resizing in both directions, with and without cropping."""

    question: str
    size: tuple[int, int]

    @property
    def image(self) -> bytes:
        """Smooth shapes with an edge, as in a radiograph; noise would hide a wrong resampling."""
        width, height = self.size
        x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
        bright = np.exp(-3 * (x**2 + y**2)) + 0.4 * (np.hypot(x - 0.3, y + 0.2) < 0.2)
        buffer = BytesIO()
        Image.fromarray((bright / bright.max() * 255).astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()


# The second is long enough to fill a block of vLLM's prefix cache, 128 tokens on a CPU.
CASES = (
    Case("Is there any abnormality?", (112, 112)),
    Case("Describe this image. " + "Name what you see and where. " * 12, (640, 480)),
    Case("Where is the lesion?", (90, 75)),
)


@dataclass(frozen=True)
class Answer:
    """Greedy tokens with their log-probs, and the most probable ones at each place."""

    tokens: list[str]
    logprobs: list[float]
    top: list[list[float]]


class Reference:
    """transformers and PEFT: every step reads the whole prefix again, alone and without a cache."""

    def __init__(self, adapters: dict[str, Path]) -> None:
        self._processor = AutoProcessor.from_pretrained(PHANTOM)
        model = LlavaForConditionalGeneration.from_pretrained(PHANTOM, dtype=torch.float32)
        (first, folder), *others = adapters.items()
        self._model = PeftModel.from_pretrained(model, folder, adapter_name=_key(first)).eval()
        for name, other in others:
            self._model.load_adapter(other, adapter_name=_key(name))

    @torch.inference_mode()
    def answer(self, version: str | None, case: Case) -> Answer:
        if version is None:
            with self._model.disable_adapter():
                return self._greedy(case)
        self._model.set_adapter(_key(version))
        return self._greedy(case)

    def _greedy(self, case: Case) -> Answer:
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": case.question}]}]
        prompt = self._processor.apply_chat_template(turn, add_generation_prompt=True)
        picture = Image.open(BytesIO(case.image)).convert("RGB")
        inputs = self._processor(text=prompt, images=picture, return_tensors="pt")
        ids, answer = inputs["input_ids"], Answer([], [], [])
        for _ in range(STEPS):
            logits = self._model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
            best = logits.float().log_softmax(-1).topk(TOP)
            ids = torch.cat([ids, best.indices[None, :1]], dim=1)
            answer.tokens.append(self._processor.tokenizer.decode(best.indices[:1]))
            answer.logprobs.append(best.values[0].item())
            answer.top.append(best.values.tolist())
        return answer


def _key(version: str) -> str:
    """PEFT's names are module names."""
    return version.replace("@", "_")


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM.load(PHANTOM)


@pytest.fixture(scope="module")
def folders(vlm: VLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("versions")
    return {
        name: save_adapter(vlm, made / str(seed), seed=seed, rank=16, scale=0.05)
        for name, seed in VERSIONS.items()
    }


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[tuple[str | None, Case], Answer]:
    reference = Reference(folders)
    return {(v, case): reference.answer(v, case) for v in (None, *VERSIONS) for case in CASES}


@pytest.fixture(scope="module", params=ENGINES)
def phantom(request: pytest.FixtureRequest) -> EngineProcess:
    return request.getfixturevalue(f"phantom_{request.param}")


@pytest.fixture
async def loaded(phantom: EngineProcess, folders: dict[str, Path]):
    """The engine with both versions, which it then forgets."""
    async with EngineClient(phantom.address) as client:
        for name, folder in folders.items():
            await client.load_adapter(name, folder)
        yield phantom
        for name in folders:
            await client.unload_adapter(name)


async def post(engine: EngineProcess, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with aiohttp.ClientSession(engine.address) as session, session.post(path, json=body) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.json()


async def served(engine: EngineProcess, version: str | None, case: Case) -> Answer:
    """`STEPS` greedy tokens, whether or not the answer would have ended before."""
    settings = Sampling(temperature=0.0, max_tokens=STEPS)
    model = version or engine.model
    request = ChatRequest.ask(model, case.question, case.image, sampling=settings, top_logprobs=TOP)
    reply = await post(engine, "/v1/chat/completions", request.body() | {"ignore_eos": True})
    entries = reply["choices"][0]["logprobs"]["content"]
    return Answer(
        [entry["token"] for entry in entries],
        [entry["logprob"] for entry in entries],
        [[other["logprob"] for other in entry["top_logprobs"]] for entry in entries],
    )


@pytest.mark.parametrize("version", [None, *VERSIONS], ids=["base", *VERSIONS])
async def test_an_engine_answers_as_transformers_and_peft(loaded, expected, version):
    for case in CASES:
        said, meant = await served(loaded, version, case), expected[version, case]
        assert said.tokens == meant.tokens
        assert said.logprobs == pytest.approx(meant.logprobs, abs=1e-3)
        for ours, theirs in zip(said.top, meant.top, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)


def test_the_versions_say_different_things(expected):
    """Otherwise an adapter that was never applied would pass."""
    for case in CASES:
        tokens = {tuple(expected[version, case].tokens) for version in (None, *VERSIONS)}
        assert len(tokens) == 1 + len(VERSIONS)


async def test_a_repeated_prompt_gets_no_stale_answer_across_a_swap(phantom, folders, expected):
    (first, second), case = VERSIONS, CASES[1]

    async def assert_own_answer(version: str | None) -> None:
        assert (await served(phantom, version, case)).tokens == expected[version, case].tokens

    async with EngineClient(phantom.address) as client:
        await client.load_adapter(first, folders[first])
        before = phantom.metric("vllm:prefix_cache_hits_total")
        for version in (None, first, None, first):
            await assert_own_answer(version)
        hits = phantom.metric("vllm:prefix_cache_hits_total") - before
        assert (hits == 0) == differs(phantom, "no prefix cache"), "repeats must come from the cache"
        await client.load_adapter(second, folders[second])
        await assert_own_answer(second)
        await client.unload_adapter(first)
        for version in (second, None):
            await assert_own_answer(version)
        await client.unload_adapter(second)


CONVERSATIONS = {
    "a question about an image": [("user", True, "Is there any abnormality?")],
    "white space": [("user", True, "  Where is it?\n\nOn the left? ")],
    "no image": [("user", False, "What is a nodule?")],
    "beyond ASCII": [("user", True, "Größe der Läsion in µm – 肺?")],
    "several turns": [
        ("user", True, "Which organ?"),
        ("assistant", False, "The lung."),
        ("user", False, "Sure?"),
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_a_conversation_becomes_the_same_tokens(phantom, vlm, name):
    turns = CONVERSATIONS[name]
    ids = vlm.chat_ids([_turn(*turn, image={"type": "image"}) for turn in turns])
    length = len(ids) + ids.count(vlm.image_token_id) * (vlm.image_token_count - 1)
    picture = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{b64encode(CASES[0].image).decode()}"},
    }
    messages = [_turn(*turn, image=picture) for turn in turns]
    body = {"model": phantom.model, "messages": messages, "max_tokens": 1}
    assert (await post(phantom, "/v1/chat/completions", body))["usage"]["prompt_tokens"] == length
    if phantom.kind == "vllm":
        tokens = (await post(phantom, "/tokenize", {"model": phantom.model, "messages": messages}))["tokens"]
        assert _placeholders_joined(tokens, vlm.image_token_id) == ids


def _turn(role: str, shown: bool, text: str, *, image: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": [*([image] if shown else []), {"type": "text", "text": text}]}


def _placeholders_joined(ids: list[int], placeholder: int) -> list[int]:
    """vLLM shows an image as one placeholder per visual token, or as one."""
    return [token for before, token in pairwise([-1, *ids]) if not token == before == placeholder]
