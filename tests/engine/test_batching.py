"""The model's thread, without HTTP: its end, and the work it does between steps."""

from concurrent.futures import Future

import pytest
import torch
from fastapi.testclient import TestClient

from hscr.errors import EngineUnavailable
from service.embedded.app import create_app
from service.embedded.batching import Batcher
from service.embedded.prompts import Picture, Pictures, Prompt, prepare
from service.embedded.sampling import Sampler
from service.embedded.schemas import Message
from service.embedded.sequences import Piece, Sequence
from service.embedded.text import TextStream
from tests.engine.conftest import png


def sequence(vlm, prompt: Prompt, *, limit: int = 5) -> tuple[Sequence, Future[list[Piece]]]:
    pieces: list[Piece] = []
    ended: Future[list[Piece]] = Future()

    def deliver(piece: Piece) -> None:
        pieces.append(piece)
        if piece.last:
            ended.set_result(pieces)

    text = TextStream(lambda ids: vlm.tokenizer.decode(ids, skip_special_tokens=True))
    sampler = Sampler.seeded(0.0, 1.0, 0)
    return Sequence(prompt, None, sampler, text, limit, None, frozenset(), deliver), ended


def ask(vlm, text: str = "what is shown?") -> Prompt:
    return prepare(vlm, Pictures(vlm), [Message(role="user", content=text)])


def poison(vlm) -> Prompt:
    """Visual tokens of another model's width, which no forward pass can take."""
    picture = Picture(pixels=None, tokens=torch.zeros(16, 7))
    return Prompt([vlm.image_token_id, 5, 6], picture, 18)


@pytest.fixture
def batcher(vlm):
    batcher = Batcher(vlm, 4, lambda *_: None)
    yield batcher
    batcher.stop()


def test_a_failing_pass_ends_the_thread_and_everything_that_waits(vlm, batcher):
    runs, never = sequence(vlm, ask(vlm), limit=400)
    bad, bad_end = sequence(vlm, poison(vlm))
    batcher.submit(runs)
    batcher.submit(bad)
    for end in (never, bad_end):
        last = end.result(20)[-1]
        assert isinstance(last.error, Exception)
    with pytest.raises(EngineUnavailable):
        batcher.submit(sequence(vlm, ask(vlm))[0])
    with pytest.raises(EngineUnavailable):
        batcher.between_steps(lambda: None)
    assert not batcher.alive


def test_stopping_tells_whoever_waits(vlm):
    batcher = Batcher(vlm, 1, lambda *_: None)
    ends = []
    for _ in range(3):
        one, end = sequence(vlm, ask(vlm), limit=450)
        batcher.submit(one)
        ends.append(end)
    batcher.stop()
    assert all(isinstance(end.result(5)[-1].error, EngineUnavailable) for end in ends)


def test_failing_work_between_steps_harms_nobody(vlm, batcher):
    one, end = sequence(vlm, ask(vlm), limit=50)
    batcher.submit(one)
    with pytest.raises(ZeroDivisionError):
        batcher.between_steps(lambda: 1 / 0).result(20)
    assert end.result(20)[-1].finish_reason == "length"


def test_a_cancelled_sequence_ends_while_running_and_while_waiting(vlm):
    batcher = Batcher(vlm, 1, lambda *_: None)
    running, running_end = sequence(vlm, ask(vlm), limit=450)
    waiting, waiting_end = sequence(vlm, ask(vlm))
    batcher.submit(running)
    batcher.submit(waiting)
    waiting.cancel()
    assert waiting_end.result(20)[-1].finish_reason == "abort"
    assert not running_end.done()
    running.cancel()
    assert running_end.result(20)[-1].finish_reason == "abort"
    assert (batcher.running, batcher.waiting) == ([], [])
    batcher.stop()


def test_an_image_is_encoded_once_and_forgotten_last(vlm, batcher):
    pictures = Pictures(vlm, capacity=2)
    first = pictures.get(png(1))
    assert pictures.get(png(1)) is first
    one, end = sequence(vlm, Prompt([1, vlm.image_token_id, 5], first, 18))
    batcher.submit(one)
    end.result(20)
    assert first.pixels is None
    assert first.tokens.shape == (vlm.image_token_count, vlm.model.config.text_config.hidden_size)
    pictures.get(png(2))
    pictures.get(png(1))
    pictures.get(png(3))
    assert pictures.get(png(1)) is first
    assert pictures.get(png(2)).tokens is None


def test_health_is_503_once_the_models_thread_is_dead(vlm):
    app = create_app(vlm, name="tiny", root="x", max_batch=2, max_loras=1, max_rank=8)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "what?"}], "max_tokens": 2}
    with TestClient(app) as http:
        assert http.get("/health").status_code == 200
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        bad, end = sequence(vlm, poison(vlm))
        app.state.batcher.submit(bad)
        end.result(20)
        assert http.get("/health").status_code == 503
        reply = http.post("/v1/chat/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, 503)
