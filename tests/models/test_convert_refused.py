"""What `hscr convert` refuses, by name; and that each of its own checks can fail."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hscr.errors import InvalidCheckpoint, NotFound
from hscr.models.convert import verify
from hscr.models.convert.original import Original
from hscr.models.convert.shards import targets
from hscr.models.convert.text import original_tokenizer
from hscr.models.vlm import VLM
from tests.models.converting import (
    Checkpoint,
    make,
    reconfigure,
    run,
)
from tests.original_llava import (
    NESTED,
    write_sentencepiece,
)


def nan(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan


def huge(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][0] = 1e6


def crooked(tensors: dict[str, Tensor]) -> None:
    tensors["model.mm_projector.2.weight"] = torch.ones(32, 16)


def blind(tensors: dict[str, Tensor]) -> None:
    tensors["model.mm_projector.2.weight"].zero_()


def untrained(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.startswith(NESTED) and name.endswith(".bias"):
            tensor.zero_()
        if name.startswith(NESTED) and "norm" in name and name.endswith(".weight"):
            tensor.fill_(1)


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (
            lambda t: t.pop("model.layers.2.self_attn.k_proj.weight"),
            {},
            "1 missing: model.layers.2.self_attn.k_",
        ),
        (lambda t: t.pop("lm_head.weight"), {}, "1 missing: lm_head.weight"),
        (lambda t: t.pop("model.embed_tokens.weight"), {}, "1 missing: model.embed_tokens.weight"),
        (lambda t: t.update({"model.image_newline": torch.ones(3)}), {}, "1 unexpected: model.image_newline"),
        (lambda t: t.pop(NESTED + "post_layernorm.bias"), {}, f"1 missing: {NESTED}post_layernorm.bias"),
        (nan, {}, r"model.layers.1.mlp.up_proj.weight holds values that are not finite"),
        (huge, {"dtype": "float16"}, "model.norm.weight holds values that are not finite as torch.float16"),
        (crooked, {}, r"1 misshapen: model.mm_projector.2.weight \[32, 16\] instead of \[32, 32\]"),
        (blind, {}, "Noise in place of a radiograph changes an answer by 0 nats"),
        (untrained, {}, "vision tower was never trained"),
    ],
)
def test_broken_weights_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], options: Any, named: str
) -> None:
    made = make(tmp_path, change)
    with pytest.raises(InvalidCheckpoint, match=named):
        run(made, **options)
    assert not made.out.exists()


def test_large_values_convert_in_the_dtype_that_holds_them(
    tmp_path: Path,
) -> None:
    assert run(make(tmp_path, huge)).dtype == "float32"


def test_a_checkpoint_without_tower_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="openai/clip-vit-large-patch14-336") as raised:
        run(make(tmp_path, spelling=None), vision_tower=None)
    assert "--vision-tower" in raised.value.remedy


def test_a_known_tower_needs_no_folder_but_its_shapes(checkpoint: Checkpoint) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"class_embedding \[32\] instead of \[1024\]") as raised:
        run(checkpoint, vision_tower=None)
    assert "--vision-tower" in raised.value.remedy


def test_an_unknown_tower_needs_its_folder(checkpoint: Checkpoint) -> None:
    reconfigure(checkpoint, mm_vision_tower="google/siglip")
    with pytest.raises(NotFound, match="google/siglip"):
        run(checkpoint, vision_tower=None)
    (checkpoint.tower / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(InvalidCheckpoint, match="no CLIP model"):
        run(checkpoint)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llava_qwen"}, "model_type = 'llava_qwen'"),
        ({"text_config": {}}, "in the hub's layout already"),
        ({"mm_projector_type": "linear"}, "mm_projector_type = 'linear'; this converts only 'mlp2x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end = True"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio = 'anyres'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": 50}, "The tokenizer has 399 tokens, the model 50"),
        ({"vocab_size": 500}, r"lm_head.weight \[399, 32\] instead of \[500, 32\]"),
        ({"num_hidden_layers": 2}, "9 unexpected: model.layers.2"),
    ],
)
def test_configurations_that_mean_another_model_are_refused(
    checkpoint: Checkpoint, changes: dict[str, Any], named: str
) -> None:
    reconfigure(checkpoint, **changes)
    with pytest.raises(InvalidCheckpoint, match=named):
        run(checkpoint)


def test_folders_that_are_no_checkpoint_say_what_they_lack(tmp_path: Path) -> None:
    made = make(tmp_path, shards=3)
    (made.folder / "model-00002-of-00003.safetensors").rename(made.folder / "elsewhere")
    with pytest.raises(NotFound, match=r"lacks the weight files model-00002-of-00003\.safetensors"):
        run(made)
    (made.folder / "model.safetensors.index.json").unlink()
    with pytest.raises(NotFound, match="no weights"):
        run(made)
    (made.folder / "tokenizer.model").unlink()
    with pytest.raises(NotFound, match="no tokenizer"):
        original_tokenizer(made.folder)
    (made.folder / "config.json").unlink()
    with pytest.raises(NotFound, match=r"no config\.json"):
        run(made)


def test_files_cut_short_and_pickles_of_more_than_tensors_are_refused(checkpoint: Checkpoint) -> None:
    file = checkpoint.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors cannot be read"):
        run(checkpoint)
    file.unlink()
    (checkpoint.folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": os.getcwd}, protocol=2))
    with pytest.raises(InvalidCheckpoint, match=r"pytorch_model\.bin cannot be read"):
        run(checkpoint)


def test_a_unigram_tokenizer_is_refused(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "tokenizer.model", model_type=1)
    with pytest.raises(InvalidCheckpoint, match="no SentencePiece BPE model"):
        original_tokenizer(tmp_path)


def test_weights_that_changed_after_writing_are_noticed(checkpoint: Checkpoint) -> None:
    run(checkpoint)
    vlm = VLM.load(checkpoint.out)
    original = Original.open(checkpoint.folder, checkpoint.tower)
    config = original.config(len(vlm.tokenizer), vlm.image_token_id, vlm.tokenizer.pad_token_id)
    plan = targets(original.tensors, config, 399, torch.float32)
    verify.same_weights(vlm, plan, lambda done, total: None)
    vlm.model.model.vision_tower.encoder.layers[2].mlp.fc1.weight[0, 0] += 1e-3
    with pytest.raises(InvalidCheckpoint, match=r"layers\.2\.mlp\.fc1\.weight was loaded with other"):
        verify.same_weights(vlm, plan, lambda done, total: None)


@pytest.mark.parametrize("field", [{"rope_theta": 1e4}, {"rms_norm_eps": 0.1}, {"sliding_window": 2}])
def test_a_language_configuration_read_otherwise_is_noticed(
    checkpoint: Checkpoint, field: dict[str, Any]
) -> None:
    run(checkpoint)
    vlm = VLM.load(checkpoint.out)
    original = Original.open(checkpoint.folder, checkpoint.tower)
    assert verify.same_language(vlm, original) == pytest.approx(0, abs=1e-5)
    original.raw.update(field)
    with pytest.raises(InvalidCheckpoint, match="logits differ"):
        verify.same_language(vlm, original)


def test_prompts_that_read_otherwise_are_noticed(checkpoint: Checkpoint) -> None:
    run(checkpoint)
    vlm = VLM.load(checkpoint.out)
    original = Original.open(checkpoint.folder, checkpoint.tower)
    vlm.tokenizer.add_tokens(["nodule"])
    with pytest.raises(InvalidCheckpoint, match="other ids than the original"):
        verify.same_prompts(vlm, original)
