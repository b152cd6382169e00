"""Files that a broken download or a slip left are refused by name, before the work where it can be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hscr.errors import Conflict, InvalidCheckpoint, InvalidInput
from hscr.models.convert import shards
from hscr.models.convert.convert import Options, convert
from hscr.models.convert.stated import read_json
from tests.models.converting import Checkpoint, make, reconfigure, run

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aaa\nsize 123\n"
ARCHIVE = "pytorch_model.bin"


def interrupt(stage: str, done: int, total: int) -> None:
    if stage == "verify":
        raise KeyboardInterrupt


def unfinished(checkpoint: Checkpoint) -> Path:
    return checkpoint.out.with_name(".converted.unfinished")


@pytest.mark.parametrize("content", [b"{oops", b"\xff\xfe\x00", b"", b"[]", b"null", b"[" * 100_000])
def test_json_that_is_no_object_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=r"some\.json"):
        read_json(tmp_path / "some.json")


@pytest.mark.parametrize(
    "name",
    [
        "original/config.json",
        "original/model.safetensors.index.json",
        "original/tokenizer.json",
        "original/tokenizer_config.json",
        "original/special_tokens_map.json",
        "original/added_tokens.json",
        "clip/config.json",
        "clip/preprocessor_config.json",
    ],
)
def test_every_broken_json_file_is_named(checkpoint: Checkpoint, name: str) -> None:
    (checkpoint.folder.parent / name).write_text("{oops")
    with pytest.raises(InvalidCheckpoint, match=name):
        run(checkpoint)
    assert not unfinished(checkpoint).exists()


@pytest.mark.parametrize(
    ("name", "stated", "named"),
    [
        ("original/model.safetensors.index.json", {}, "names no weight files"),
        ("original/model.safetensors.index.json", {"weight_map": {"a": 5}}, "names no weight files"),
        ("original/special_tokens_map.json", {"bos_token": {"a": 1}}, "as a special token"),
        ("original/special_tokens_map.json", {"bos_token": 5}, "names 5 as a special token"),
        ("original/added_tokens.json", {"<x>": "many", "<y>": 3}, "ids that are no numbers"),
        ("clip/config.json", {"hidden_size": "x"}, "'hidden_size' expected int"),
        ("clip/config.json", {"patch_size": 0}, "ZeroDivisionError"),
        ("clip/config.json", {"model_type": []}, "no CLIP model"),
        ("clip/preprocessor_config.json", {"image_mean": "x"}, "image_mean = 'x'"),
        ("clip/preprocessor_config.json", {"image_std": [1, 1]}, "image_std"),
        ("clip/preprocessor_config.json", {"resample": 99}, "resample = 99"),
    ],
)
def test_values_that_cannot_be_used_are_named(
    checkpoint: Checkpoint, name: str, stated: dict[str, Any], named: str
) -> None:
    file = checkpoint.folder.parent / name
    file.write_text(json.dumps(read_json(file) | stated))
    with pytest.raises(InvalidCheckpoint, match=named):
        run(checkpoint)
    assert not unfinished(checkpoint).exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": "x"}, "'vocab_size' expected int"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_size": -32}, "No model can be made"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"rope_theta": "x"}, "No model can be made"),
        ({"bos_token_id": [1, 2]}, "'bos_token_id'"),
        ({"model_type": ["llava"]}, "model_type"),
        ({"mm_vision_select_layer": "x"}, "mm_vision_select_layer = 'x'; the vision tower has 3 layers"),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer = -9"),
    ],
)
def test_configurations_that_make_no_model_are_refused(
    checkpoint: Checkpoint, changes: dict[str, Any], named: str
) -> None:
    reconfigure(checkpoint, **changes)
    with pytest.raises(InvalidCheckpoint, match=named):
        run(checkpoint)
    assert not unfinished(checkpoint).exists()


def test_a_configuration_without_vocabulary_has_transformers_own(checkpoint: Checkpoint) -> None:
    file = checkpoint.folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in read_json(file).items() if k != "vocab_size"}))
    with pytest.raises(InvalidCheckpoint, match=r"embed_tokens.weight \[399, 32\] instead of \[32000, 32\]"):
        run(checkpoint)


def test_padding_beyond_the_vocabulary_changes_nothing(checkpoint: Checkpoint) -> None:
    reconfigure(checkpoint, pad_token_id=700)
    assert run(checkpoint).logits_difference == pytest.approx(0, abs=1e-5)


def test_a_model_too_short_for_the_checks_says_so(checkpoint: Checkpoint) -> None:
    reconfigure(checkpoint, sliding_window=4)
    with pytest.raises(InvalidCheckpoint, match="reads fewer than 4") as raised:
        run(checkpoint)
    assert "sliding_window" in raised.value.remedy


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[:5000],
        lambda good: b"<html>not found</html>",
        lambda good: b"abc",
        lambda good: POINTER,
    ],
)
def test_damaged_pickles_are_refused_without_advice_to_run_them(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    made = make(tmp_path, form="bin")
    file = made.folder / ARCHIVE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InvalidCheckpoint, match=r"pytorch_model\.bin cannot be read") as raised:
        run(made)
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        ([torch.ones(2)], "no tensors by name but a list"),
        ({"model": {"a": torch.ones(2)}}, "'model' is none"),
        ({"a": torch.ones(2), "epoch": 3}, "'epoch' is none"),
        ({7: torch.ones(2)}, "7 is none"),
    ],
)
def test_pickles_of_other_than_named_tensors_are_refused(tmp_path: Path, saved: Any, named: str) -> None:
    made = make(tmp_path, form="bin")
    torch.save(saved, made.folder / ARCHIVE)
    with pytest.raises(InvalidCheckpoint, match=named):
        run(made)


def test_a_tokenizer_that_is_a_pointer_is_refused(checkpoint: Checkpoint) -> None:
    (checkpoint.folder / "tokenizer.model").write_bytes(POINTER)
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.model cannot be read as a SentencePiece"):
        run(checkpoint)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_quantised_and_complex_weights_are_refused_by_name(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    with pytest.raises(InvalidCheckpoint, match=f"1 quantised or no real numbers: {name} {dtype}"):
        run(make(tmp_path, cast))


def test_a_cut_shard_of_an_unfinished_conversion_says_what_to_delete(checkpoint: Checkpoint) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint.folder, checkpoint.out, Options(checkpoint.tower), interrupt)
    shard = unfinished(checkpoint) / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(InvalidCheckpoint, match=r"\.converted\.unfinished cannot be loaded") as raised:
        run(checkpoint)
    assert "Delete that folder" in raised.value.remedy


def test_a_shard_is_on_the_disk_before_it_has_its_name(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(shards, "sync", lambda path: synced.append(path.name))
    run(checkpoint)
    assert synced == ["model.safetensors.writing", ".converted.unfinished"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(checkpoint: Checkpoint, exists: bool) -> None:
    real = checkpoint.out.with_name("real")
    if exists:
        real.mkdir()
    checkpoint.out.symlink_to("real")
    run(checkpoint)
    assert checkpoint.out.is_symlink()
    assert (real / "model.safetensors").is_file()


def test_a_mounted_volume_is_refused_before_the_work(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == checkpoint.out)
    with pytest.raises(Conflict, match="mounted volume"):
        run(checkpoint)
    assert not unfinished(checkpoint).exists()


def test_a_target_taken_meanwhile_loses_no_work(checkpoint: Checkpoint) -> None:
    def take(stage: str, done: int, total: int) -> None:
        (checkpoint.out / "theirs").mkdir(parents=True, exist_ok=True)

    with pytest.raises(Conflict, match="cannot be replaced") as raised:
        convert(checkpoint.folder, checkpoint.out, Options(checkpoint.tower), take)
    assert str(unfinished(checkpoint)) in raised.value.remedy
    assert (unfinished(checkpoint) / "README.md").is_file()


@pytest.mark.parametrize("device", ["nonsense", "cuda:999", "meta", "", "hpu"])
def test_a_device_that_is_not_here_is_refused_before_the_work(checkpoint: Checkpoint, device: str) -> None:
    with pytest.raises(InvalidInput, match="no device") as raised:
        run(checkpoint, device=device)
    assert "--device" in raised.value.remedy
    assert not unfinished(checkpoint).exists()
