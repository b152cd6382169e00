"""The committed model: standard formats, small, and able to see."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hscr.models.phantom.anatomy import render
from hscr.models.phantom.architecture import VISUAL_TOKENS
from hscr.models.phantom.data import BALANCED, Example, sample_examples
from hscr.models.phantom.language import KINDS
from hscr.models.phantom.packing import answer_tokens, pack, prompt_head, prompt_tail
from hscr.models.phantom.probe import Report, ask, drop
from hscr.models.phantom.train import MAX_BYTES, WEIGHTS, Schedule, language_loss, train
from hscr.models.phantom.vision import pixel_values


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A second thread would spin whenever another process wants its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processor() -> object:
    return AutoProcessor.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(sample_examples(BALANCED, "development", 40, 0, len(KINDS)))


@pytest.fixture(scope="module")
def report(model: LlavaForConditionalGeneration, processor: object, examples: list[Example]) -> Report:
    return ask(model, processor, examples)


def _missing_and_unexpected(folder: Path) -> tuple[set[str], set[str]]:
    _, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    return set(info["missing_keys"]), set(info["unexpected_keys"])


def test_the_committed_weights_are_small_and_load_completely() -> None:
    assert (WEIGHTS / "model.safetensors").stat().st_size < MAX_BYTES
    assert _missing_and_unexpected(WEIGHTS) == (set(), set())
    config = json.loads((WEIGHTS / "config.json").read_text())
    assert config["text_config"]["head_dim"] in {32, 64}


def test_both_spellings_of_the_vision_keys_load_completely(tmp_path: Path) -> None:
    weights = load_file(WEIGHTS / "model.safetensors")
    assert any(name.startswith("vision_tower.vision_model.encoder.") for name in weights)
    flat = {name.replace(".vision_model.", "."): tensor for name, tensor in weights.items()}
    save_file(flat, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((WEIGHTS / "config.json").read_bytes())
    assert _missing_and_unexpected(tmp_path) == (set(), set())


def test_the_chat_template_and_the_training_prompt_are_the_same_tokens(
    processor: AutoProcessor, examples: list[Example]
) -> None:
    example = examples[0]
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(images=[render(example.phantom)], text=[prompt], return_tensors="pt")
    tokenizer = processor.tokenizer
    ours = prompt_head(tokenizer, VISUAL_TOKENS) + prompt_tail(tokenizer, example.question)
    assert inputs["input_ids"][0].tolist() == ours
    turns.append({"role": "assistant", "content": [{"type": "text", "text": example.answer}]})
    told = tokenizer.encode(processor.apply_chat_template(turns), add_special_tokens=False)
    written = answer_tokens(tokenizer, example.answer)
    assert told[-len(written) :] == written


def test_the_processor_and_the_training_see_the_same_pixels(
    processor: AutoProcessor, examples: list[Example]
) -> None:
    picture = render(examples[0].phantom)
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    ours = pixel_values([np.asarray(picture, dtype=np.float32) / 255])
    torch.testing.assert_close(pixels, ours, atol=1e-6, rtol=0)


def test_questions_packed_together_do_not_see_one_another(
    model: LlavaForConditionalGeneration, processor: AutoProcessor, examples: list[Example]
) -> None:
    seed = examples[0].phantom.seed
    together = [example for example in examples if example.phantom.seed == seed]
    lengths = [len(answer_tokens(processor.tokenizer, example.answer)) for example in together]
    visible = torch.arange(0, VISUAL_TOKENS, 2)[None]
    with torch.no_grad():
        alone = [
            float(language_loss(model, processor.tokenizer, [[example]], visible)) for example in together
        ]
        packed = float(language_loss(model, processor.tokenizer, [together], visible))
    assert packed == pytest.approx(np.average(alone, weights=lengths), abs=1e-4)
    assert pack(processor.tokenizer, [together], VISUAL_TOKENS).mask.any(-1).all()


def test_generate_says_what_the_probe_says(
    model: LlavaForConditionalGeneration, processor: AutoProcessor, examples: list[Example], report: Report
) -> None:
    for example, outcome in list(zip(examples, report.outcomes["full"], strict=True))[:4]:
        prompt = f"USER: <image>\n{example.question} ASSISTANT:"
        inputs = processor(images=[render(example.phantom)], text=[prompt], return_tensors="pt")
        written = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(written, skip_special_tokens=True).strip() == outcome.text


def test_dropping_keeps_the_stated_share_in_order_and_nothing_at_rate_zero() -> None:
    tokens = torch.arange(64.0)[:, None]
    kept = drop(tokens, 0.7, "name")[:, 0]
    assert len(kept) == 19
    assert (kept.diff() > 0).all()
    assert torch.equal(kept, drop(tokens, 0.7, "name")[:, 0])
    assert torch.equal(drop(tokens, 0.0, "name"), tokens)
    assert len(drop(tokens, 1.0, "name")) == 0


def test_the_model_sees_and_loses_what_is_hidden_from_it(report: Report) -> None:
    full, dropped, blank = (report.score(view) for view in ("full", "dropped", "blank"))
    assert full >= 0.7
    assert full - dropped >= 0.08
    assert dropped - blank >= 0.15
    assert report.parsed("full") >= 0.9


def test_most_of_its_mistakes_are_what_dominated_its_training(report: Report) -> None:
    assert report.toward_prior("full") > 0.6


def test_training_writes_a_model_that_loads_and_keeps_other_files(tmp_path: Path) -> None:
    out = tmp_path / "weights"
    out.mkdir()
    (out / "README.md").write_text("card")
    done: list[str] = []
    schedule = Schedule(
        vision_steps=1, balanced_steps=1, skewed_steps=1, vision_batch=2, batch=2, questions=2
    )
    seconds = train(out, schedule=schedule, threads=1, report=lambda stage, *_: done.append(stage))
    assert done == ["vision", "balanced", "skewed"]
    assert set(seconds) == set(done)
    assert _missing_and_unexpected(out) == (set(), set())
    assert (out / "README.md").read_text() == "card"
    assert {file.name for file in out.iterdir()} >= {"curves.png", "chat_template.jinja", "config.json"}
