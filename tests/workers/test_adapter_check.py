"""Adapters that must never reach an engine, each refused by the name of what is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from hscr.errors import AdapterRefused, StoreError
from hscr.store.blobs import folder_digest
from tests.workers.harness import make_adapter
from workers.adapter_check import CONFIG, WEIGHTS, check_adapter

LAYER = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return make_adapter(tiny, tmp_path_factory.mktemp("good") / "adapter", seed=1)


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


Spoil = Callable[[dict[str, np.ndarray]], None]


def a(side: str) -> str:
    return f"{LAYER}.lora_{side}.weight"


def poison(value: float) -> Spoil:
    def spoil(weights: dict[str, np.ndarray]) -> None:
        weights[a("B")][3, 1] = value

    return spoil


def wrong_shape(weights: dict[str, np.ndarray]) -> None:
    weights[a("A")] = np.ascontiguousarray(weights[a("A")][:, :-1])


def other_rank(weights: dict[str, np.ndarray]) -> None:
    weights[a("A")], weights[a("B")] = (
        np.ones((2, weights[a("A")].shape[1]), np.float32),
        np.ones((weights[a("B")].shape[0], 2), np.float32),
    )


def missing_layer(weights: dict[str, np.ndarray]) -> None:
    for side in "AB":
        del weights[a(side)]


def missing_half(weights: dict[str, np.ndarray]) -> None:
    del weights[a("B")]


def renamed(new: str) -> Spoil:
    def spoil(weights: dict[str, np.ndarray]) -> None:
        for side in "AB":
            weights[a(side).replace("language_model.layers.0.self_attn.q_proj", new)] = weights[a(side)]

    return spoil


def no_change(weights: dict[str, np.ndarray]) -> None:
    for name, values in weights.items():
        if ".lora_B." in name:
            values[:] = 0


def integers(weights: dict[str, np.ndarray]) -> None:
    weights[a("A")] = weights[a("A")].astype(np.int32)


def nothing(weights: dict[str, np.ndarray]) -> None:
    weights.clear()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (poison(float("nan")), f"{a('B')} holds NaN or infinity"),
        (poison(float("inf")), f"{a('B')} holds NaN or infinity"),
        (wrong_shape, f"{a('A')} has shape [4, 31], not [4, 32]"),
        (other_rank, "has shape"),
        (missing_layer, "layers.0.self_attn.q_proj is a target without weights"),
        (missing_half, "lacks its other half, lora_B"),
        (renamed("language_model.layers.7.self_attn.q_proj"), "layers.7.self_attn.q_proj"),
        (renamed("vision_tower.encoder.layers.0.self_attn.q_proj"), "vision_tower"),
        (renamed("multi_modal_projector.linear_1"), "multi_modal_projector"),
        (no_change, "changes nothing"),
        (integers, "has type I32"),
        (nothing, "holds no tensors"),
    ],
    ids=[
        "nan", "infinity", "shape", "rank", "missing layer", "missing half", "no such layer", "vision",
        "projector", "all zero", "integers", "empty",
    ],
)  # fmt: skip
def test_spoilt_weights(adapter: Path, tiny: Path, spoil: Spoil, named: str) -> None:
    weights = load_file(adapter / WEIGHTS)
    spoil(weights)
    save_file(weights, adapter / WEIGHTS)
    with pytest.raises(AdapterRefused) as caught:
        check_adapter(adapter, tiny)
    assert named in caught.value.detail
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 65}, "rank 65"),
        ({"r": 0}, "rank 0"),
        ({"r": 8}, "has shape"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf"),
        ({"lora_alpha": -1}, "lora_alpha -1"),
        ({"lora_alpha": 0}, "lora_alpha 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"lora_alpha": "16"}, "lora_alpha 16"),
        ({"lora_alpha": 10**400}, "lora_alpha 1000"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"some_new_trick": True}, "some_new_trick"),
        ({"target_modules": None}, "no usable target_modules"),
        ({"target_modules": "(q_proj"}, "no usable target_modules"),
        ({"target_modules": ["q_proj"]}, "has weights but is no target"),
    ],
)
def test_spoilt_configuration(adapter: Path, tiny: Path, changes: dict[str, object], named: str) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(AdapterRefused) as caught:
        check_adapter(adapter, tiny)
    assert named in caught.value.detail


def test_harmless_settings_are_allowed(adapter: Path, tiny: Path) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"some_new_trick": None, "lora_alpha": 0.5}))
    check_adapter(adapter, tiny)


def two_prefixes(weights: dict[str, np.ndarray]) -> None:
    for side in "AB":
        weights[a(side).replace("model.model.language_model.", "model.language_model.model.")] = weights.pop(
            a(side)
        )


def test_layers_under_two_names(adapter: Path, tiny: Path) -> None:
    weights = load_file(adapter / WEIGHTS)
    two_prefixes(weights)
    save_file(weights, adapter / WEIGHTS)
    with pytest.raises(AdapterRefused, match="changes no linear layer of this language model"):
        check_adapter(adapter, tiny)


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "new_embeddings.safetensors", "run.py"])
def test_other_files(adapter: Path, tiny: Path, name: str) -> None:
    (adapter / name).write_bytes(b"x")
    with pytest.raises(AdapterRefused, match=f"{name} does not belong into an adapter"):
        check_adapter(adapter, tiny)


def test_a_folder_within(adapter: Path, tiny: Path) -> None:
    (adapter / "README.md").mkdir()
    with pytest.raises(AdapterRefused, match=r"README.md does not belong"):
        check_adapter(adapter, tiny)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links(adapter: Path, tiny: Path, tmp_path: Path, name: str) -> None:
    (adapter / name).rename(tmp_path / name)
    (adapter / name).symlink_to(tmp_path / name)
    with pytest.raises(AdapterRefused, match=f"{name} is a symbolic link"):
        check_adapter(adapter, tiny)


def test_a_linked_folder(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(adapter)
    with pytest.raises(AdapterRefused, match="link is a symbolic link"):
        check_adapter(tmp_path / "link", tiny)


def test_a_file_beyond_all_bounds(adapter: Path, tiny: Path) -> None:
    with (adapter / WEIGHTS).open("r+b") as file:
        file.truncate((2 << 30) + 1)  # sparse
    with pytest.raises(AdapterRefused, match=f"{WEIGHTS} has 2147483649 bytes"):
        check_adapter(adapter, tiny)


def header_of(path: Path) -> tuple[bytes, bytes]:
    """The header's JSON and the bytes after it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def write(path: Path, header: bytes, rest: bytes, length: int | None = None) -> None:
    stated = len(header) if length is None else length
    path.write_bytes(stated.to_bytes(8, "little") + header + rest)


@pytest.mark.parametrize("lie", [-1, 1, 1000, 2**40, 2**64 - 1])
def test_a_header_that_lies_about_its_length(adapter: Path, tiny: Path, lie: int) -> None:
    header, rest = header_of(adapter / WEIGHTS)
    write(adapter / WEIGHTS, header, rest, lie if lie > 1000 else len(header) + lie)
    with pytest.raises(AdapterRefused, match=f"{WEIGHTS} cannot be read"):
        check_adapter(adapter, tiny)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"data_offsets":[0,', '"data_offsets":[0.0,'),
        ('"data_offsets":[0,', '"data_offsets":[-4,'),
        ('"data_offsets":[0,', '"data_offsets":["0",'),
        ('"dtype":"F32"', '"dtype":["F32"]'),
        ('"shape":[', '"shape":[true,'),
        ('"shape":[', '"shape":"x","y":['),
        ("{", '{"__metadata__":{"format":"pt"},'),
        ("{", "[" * 100_000),
    ],
    ids=["fraction", "negative", "text", "type", "truth", "no list", "twice", "deep"],
)
def test_a_header_of_other_values(adapter: Path, tiny: Path, old: str, new: str) -> None:
    header, rest = header_of(adapter / WEIGHTS)
    assert old.encode() in header
    write(adapter / WEIGHTS, header.replace(old.encode(), new.encode(), 1), rest)
    with pytest.raises(AdapterRefused, match=f"{WEIGHTS} cannot be read"):
        check_adapter(adapter, tiny)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), byte=st.integers(0, 255), name=st.sampled_from([CONFIG, WEIGHTS]))
def test_any_changed_byte_is_refused_or_harmless(
    good: Path, tiny: Path, tmp_path: Path, place: float, byte: int, name: str
) -> None:
    """Never another exception: it would end the agent."""
    folder = tmp_path / "changed"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    data = bytearray((folder / name).read_bytes())
    end = len(data) if name == CONFIG else 8 + int.from_bytes(data[:8], "little")
    data[int(place * (end - 1))] = byte
    (folder / name).write_bytes(data)
    try:
        check_adapter(folder, tiny)
    except AdapterRefused as refused:
        assert refused.remedy  # noqa: PT017 - it may as well be accepted


def cut(size: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:size]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize(
    "damage",
    [cut(0), cut(5), cut(200), cut(-1), lambda data: b"\xff" * 8 + data, lambda data: data + b"x"],
    ids=["0 bytes", "5 bytes", "200 bytes", "last byte", "huge header", "a byte too many"],
)
def test_damaged_files(adapter: Path, tiny: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    path = adapter / name
    path.write_bytes(damage(path.read_bytes()) if name == WEIGHTS else damage(path.read_bytes()[:-2]))
    with pytest.raises(AdapterRefused, match=name):
        check_adapter(adapter, tiny)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_files(adapter: Path, tiny: Path, name: str) -> None:
    (adapter / name).unlink()
    with pytest.raises(AdapterRefused, match=name):
        check_adapter(adapter, tiny)


def test_other_bytes_than_were_stored(adapter: Path, tiny: Path) -> None:
    digest = folder_digest(adapter)
    check_adapter(adapter, tiny, digest=digest)
    (adapter / CONFIG).write_text((adapter / CONFIG).read_text() + " ")
    with pytest.raises(StoreError, match="not those that were stored"):
        check_adapter(adapter, tiny, digest=digest)


def test_an_adapter_of_another_base(adapter: Path, tmp_path: Path) -> None:
    from tests.tiny_llava import build

    with pytest.raises(AdapterRefused, match="has shape"):
        check_adapter(adapter, build(tmp_path / "wide", width=64))


@pytest.mark.parametrize("bits", ["F16", "BF16"])
def test_half_precision(adapter: Path, tiny: Path, bits: str) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    kind = {"F16": torch.float16, "BF16": torch.bfloat16}[bits]
    weights = {name: value.to(kind) for name, value in load_torch(adapter / WEIGHTS).items()}
    save_torch(weights, adapter / WEIGHTS)
    check_adapter(adapter, tiny)
    weights[a("B")][0, 0] = float("inf")
    save_torch(weights, adapter / WEIGHTS)
    with pytest.raises(AdapterRefused, match="infinity"):
        check_adapter(adapter, tiny)
