"""Checkpoints in LLaVA's own layout become the same model in the hub's, or nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hscr.errors import Conflict, InvalidCheckpoint, InvalidInput
from hscr.models.convert import verify
from hscr.models.convert.convert import Options, convert
from hscr.models.convert.text import IMAGE
from hscr.models.vlm import VLM
from tests.models.converting import (
    MISTRAL,
    QUESTION,
    VICUNA,
    Checkpoint,
    make,
    original_pixels,
    quiet,
    run,
)
from tests.original_llava import (
    FLAT,
    NESTED,
    Parts,
    sentencepiece_ids,
    sentencepieces,
    write_original,
    write_tower,
)
from tests.tiny_llava import picture
from workers.agent import intended_use


@pytest.mark.parametrize(
    ("kind", "spelling", "form", "prompt"),
    [
        ("llava_mistral", NESTED, {"form": "safetensors", "shards": 3}, MISTRAL),
        ("llava_mistral", FLAT, {"form": "bin", "shards": 2}, MISTRAL),
        ("llava", None, {"form": "bin"}, VICUNA),
        ("llava_llama", NESTED, {"form": "legacy_bin"}, VICUNA),
    ],
)
@torch.no_grad()
def test_logits_equal_the_original_composed_by_hand(
    tmp_path: Path, kind: str, spelling: str | None, form: dict[str, Any], prompt: str
) -> None:
    made = make(tmp_path, kind=kind, spelling=spelling, **form)
    done = run(made, max_shard_bytes=100_000)
    assert done.shards > 1
    vlm = VLM.load(made.out)
    image = picture(1, 60).crop((0, 0, 60, 25))

    before, after = prompt.split(IMAGE)
    pieces = [[1, *sentencepiece_ids(before)], sentencepiece_ids(after)]
    expected = made.parts.logits(pieces, original_pixels(image))

    assert vlm.prompt(QUESTION) == "<s>" + prompt
    inputs = vlm.processor(
        text=vlm.prompt(QUESTION), images=image, add_special_tokens=False, return_tensors="pt"
    )
    found = vlm.model(**inputs).logits[0]
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1

    loss = (expected.log_softmax(-1) - found.log_softmax(-1)[:, : expected.shape[1]]).max()
    assert 0 < loss <= math.log1p((found.shape[1] - expected.shape[1]) / expected.shape[1]) + 1e-5


def test_a_conversion_says_what_it_proved(checkpoint: Checkpoint) -> None:
    done = run(checkpoint)
    layer = load_file(checkpoint.out / "model.safetensors")
    assert done.tensors == len(layer)
    assert done.digest == VLM.load(checkpoint.out).digest
    assert done.canary.change > verify.CANARY_THRESHOLD
    assert done.vision.keys() == {"vision layer 0", "vision layer 2"}
    assert len(set(done.vision.values())) == 2
    assert intended_use(checkpoint.out).startswith("Research only, not for clinical use")
    assert {path.name for path in checkpoint.out.parent.iterdir()} == {"original", "clip", "converted"}


def test_vision_weights_keep_the_names_that_vllm_reads(checkpoint: Checkpoint) -> None:
    run(checkpoint)
    names = set(load_file(checkpoint.out / "model.safetensors"))
    assert "vision_tower.vision_model.encoder.layers.2.mlp.fc2.bias" in names
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight"} <= names
    assert "multi_modal_projector.linear_2.bias" in names


def test_new_rows_are_the_mean_of_the_old(checkpoint: Checkpoint) -> None:
    run(checkpoint, vocabulary_multiple=64)
    saved = load_file(checkpoint.out / "model.safetensors")
    head = checkpoint.parts.language.lm_head.weight.detach()
    found = saved["language_model.lm_head.weight"]
    assert len(found) == 448
    assert torch.equal(found[: len(head)], head)
    torch.testing.assert_close(found[len(head) :], head.mean(0).expand(448 - len(head), -1))


def test_the_checkpoints_own_tower_wins_unless_told_otherwise(tmp_path: Path) -> None:
    made = make(tmp_path, shards=2)
    other = Parts.random(len(sentencepieces()), seed=1)
    write_tower(made.tower, other, prefix="")
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
    for flag, parts in ((False, made.parts), (True, other)):
        out = made.out.with_name(f"out-{flag}")
        convert(made.folder, out, Options(made.tower, replace_vision_tower=flag), quiet)
        expected = parts.vision.encoder.layers[0].mlp.fc1.bias
        assert torch.equal(load_file(out / "model.safetensors")[name], expected)


def test_no_tower_takes_the_place_of_the_checkpoints_own_without_being_named(tmp_path: Path) -> None:
    made = make(tmp_path)
    with pytest.raises(InvalidInput, match="No vision tower was named") as refused:
        convert(made.folder, made.out, Options(replace_vision_tower=True), quiet)
    assert "--vision-tower" in refused.value.remedy
    assert not made.out.exists()


def test_another_dtype_is_the_rounded_original(checkpoint: Checkpoint) -> None:
    assert run(checkpoint, dtype="bfloat16").dtype == "bfloat16"
    norm = load_file(checkpoint.out / "model.safetensors")["language_model.model.norm.weight"]
    assert torch.equal(norm, checkpoint.parts.language.model.norm.weight.bfloat16())


def test_a_conversion_cut_off_goes_on_with_the_shards_it_has(checkpoint: Checkpoint) -> None:
    options = Options(checkpoint.tower, max_shard_bytes=60_000)

    def cut(stage: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint.folder, checkpoint.out, options, cut)
    assert not checkpoint.out.exists()
    aside = checkpoint.out.with_name(".converted.unfinished")
    kept = {file.name: file.stat().st_ino for file in aside.glob("model-*.safetensors")}
    done = convert(checkpoint.folder, checkpoint.out, options, quiet)
    assert 0 < len(kept) < done.shards
    assert kept.items() <= {file.name: file.stat().st_ino for file in checkpoint.out.iterdir()}.items()
    straight = convert(checkpoint.folder, checkpoint.out.with_name("straight"), options, quiet)
    assert straight.digest == done.digest
    assert not aside.exists()


def test_shards_of_another_conversion_are_not_reused(tmp_path: Path) -> None:
    made = make(tmp_path, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(InvalidCheckpoint, match="not finite"):
        run(made, max_shard_bytes=20_000)
    tensors = made.parts.tensors()
    tensors["model.embed_tokens.weight"][7] = 5
    write_original(made.folder, made.parts, tensors)
    run(made, max_shard_bytes=20_000)
    weights = VLM.load(made.out).model.get_input_embeddings().weight
    assert torch.equal(weights[7], torch.full_like(weights[7], 5))


def test_a_folder_in_use_is_left_alone(checkpoint: Checkpoint) -> None:
    checkpoint.out.mkdir()
    (checkpoint.out / "mine.txt").write_text("mine")
    with pytest.raises(Conflict, match="not empty"):
        run(checkpoint)
    assert [file.name for file in checkpoint.out.iterdir()] == ["mine.txt"]
