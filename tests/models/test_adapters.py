"""Adapters change the language model only, come off without a trace, and are checked before they go on."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hscr.config import FinetuneConfig
from hscr.errors import AdapterRefused, Conflict, NotFound
from hscr.models.vlm import VLM
from tests.tiny_llava import picture

CONFIG = FinetuneConfig(rank=4)


@torch.no_grad()
def score(vlm: VLM) -> Tensor:
    visual = vlm.visual_tokens(vlm.pixel_values([picture(0)]))
    context = vlm.prefill(vlm.embed([vlm.prompt_ids("is it?")], visual))
    return vlm.completion_logprobs(context, [[vlm.completion_ids("yes, left.")]])[0][0]


@pytest.fixture
def saved(vlm: VLM, tmp_path: Path) -> tuple[Path, Tensor]:
    """A folder with a non-zero adapter, and what the model says with it."""
    with vlm.with_lora(CONFIG) as parameters:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.05)
        vlm.adapters.save("trainee", tmp_path)
        return tmp_path, score(vlm)


def test_24_a_fresh_adapter_equals_the_base_bit_for_bit(vlm: VLM) -> None:
    base = score(vlm)
    with vlm.with_lora(CONFIG):
        assert torch.equal(score(vlm), base)


def test_24_adapter_off_equals_the_base_bit_for_bit(vlm: VLM, saved: tuple[Path, Tensor]) -> None:
    folder, adapted = saved
    base = score(vlm)
    vlm.load_adapter(folder, "a@1.0")
    with vlm.use("a@1.0"):
        assert torch.equal(score(vlm), adapted)
        with vlm.use(None):
            assert torch.equal(score(vlm), base)
        assert torch.equal(score(vlm), adapted)
    assert torch.equal(score(vlm), base)
    assert not torch.allclose(adapted, base)
    vlm.unload_adapter("a@1.0")
    assert vlm.adapters.names == ()


def test_only_the_language_model_is_trained(vlm: VLM) -> None:
    with vlm.with_lora(CONFIG) as parameters:
        assert len(parameters) == 2 * 7 * 2  # A and B of seven layers in each of two blocks
        assert all(".language_model." in name for name in parameters)
        trainable = [n for n, p in vlm.model.named_parameters() if p.requires_grad]
        assert trainable == list(parameters)
    assert not any(p.requires_grad for p in vlm.model.parameters())


def test_a_fresh_adapter_leaves_the_callers_random_state_alone(vlm: VLM) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with vlm.with_lora(CONFIG):
        assert torch.equal(torch.rand(3), expected)


def test_dropout_of_a_loaded_adapter_is_off(vlm: VLM, tmp_path: Path) -> None:
    with vlm.with_lora(FinetuneConfig(rank=4, dropout=0.5)) as parameters:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.05)
        assert not torch.equal(score(vlm), score(vlm))
        vlm.adapters.save("trainee", tmp_path)
    vlm.load_adapter(tmp_path, "dropout")
    with vlm.use("dropout"):
        assert torch.equal(score(vlm), score(vlm))
    vlm.unload_adapter("dropout")


def test_names_are_used_once(vlm: VLM, saved: tuple[Path, Tensor]) -> None:
    vlm.load_adapter(saved[0], "twice")
    with pytest.raises(Conflict, match="already loaded"):
        vlm.load_adapter(saved[0], "twice")
    with vlm.use("twice"), pytest.raises(Conflict, match="in use"):
        vlm.unload_adapter("twice")
    vlm.unload_adapter("twice")
    with pytest.raises(NotFound, match="not loaded"), vlm.use("twice"):
        pass


def _rename(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {key.replace(old, new): value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda w: {k: torch.full_like(v, float("nan")) for k, v in w.items()}, "NaN"),
        (lambda w: {k: v[:, :-1] for k, v in w.items()}, "has shape"),
        (lambda w: {k: v for k, v in w.items() if "lora_B" not in k}, "other half"),
        (lambda w: {k: v for k, v in w.items() if "q_proj" not in k}, "is a target without weights"),
        (_rename("language_model", "vision_tower.encoder"), "no linear layer of the language model"),
        (_rename("layers.0", "layers.9"), "no linear layer of the language model"),
        (lambda w: {}, "no weights"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    vlm: VLM,
    saved: tuple[Path, Tensor],
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    reason: str,
) -> None:
    base, file = score(vlm), saved[0] / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in spoil(load_file(file)).items()}, file)
    with pytest.raises(AdapterRefused, match=reason):
        vlm.load_adapter(saved[0], "spoilt")
    assert vlm.adapters.names == ()
    assert torch.equal(score(vlm), base)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        # These two move a part of the base model's weights, and unloading does not bring it back.
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights"),
        ({"init_lora_weights": "olora"}, "sets init_lora_weights"),
        ({"peft_type": "IA3"}, "describes IA3"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
        ({"lora_alpha": "x"}, "lora_alpha x"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"lora_dropout": 2.0}, "lora_dropout 2.0"),
        ({"target_modules": "((("}, "no usable target_modules"),
        ({"target_modules": ["no_such_layer"]}, "has weights but is no target"),
        ({"target_modules": ["q_proj", "multi_modal_projector.linear_1"]}, "is a target without weights"),
    ],
)
def test_more_than_plain_lora_is_refused_and_leaves_nothing(
    vlm: VLM, saved: tuple[Path, Tensor], settings: dict[str, object], reason: str
) -> None:
    base, file = score(vlm), saved[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(AdapterRefused, match=re.escape(reason)):
        vlm.load_adapter(saved[0], "spoilt")
    assert vlm.adapters.names == ()
    assert torch.equal(score(vlm), base)
    assert not [name for name, _ in vlm.model.named_modules() if "vision" in name and "lora" in name]


def test_a_truncated_file_is_refused(vlm: VLM, saved: tuple[Path, Tensor]) -> None:
    file = saved[0] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(AdapterRefused, match="No adapter can be read"):
        vlm.load_adapter(saved[0], "torn")
