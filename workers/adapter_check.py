"""Whether an adapter may come near an engine, read from its bytes alone, without torch.

An engine accepts NaN, layers that do not exist and wrong shapes with status 200, and one such adapter can
spoil the answers of others; weights outside the language model it ignores without a word. So everything is
checked here first: when an adapter is made, and again beside every engine that is to load it.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hscr.errors import AdapterRefused
from hscr.models.plain_lora import RETRAIN, check_plain, targeted
from hscr.store.blobs import READY, check_whole
from workers.tensors import Tensor, read_header, read_values

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK, MAX_ALPHA = 64, 1e6
_MAX_BYTES = {CONFIG: 1 << 20, WEIGHTS: 2 << 30, READY: 1 << 10, "README.md": 1 << 20}

_PROJECTIONS = r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
_BASE_KEY = re.compile(rf"(?:.*\.)?language_model\.(?:model\.)?(layers\.\d+\.{_PROJECTIONS})\.weight")
_KEY = re.compile(
    r"base_model\.model\.(?P<prefix>(?:model\.)?language_model\.(?:model\.)?)"
    rf"(?P<layer>layers\.\d+\.{_PROJECTIONS})\.lora_(?P<side>[AB])\.weight"
)


def check_adapter(folder: Path, base: Path, *, digest: str | None = None) -> None:
    """Raises AdapterRefused, naming file or tensor, unless `folder` is a plain, finite LoRA of `base`.

    Args:
        folder: PEFT's adapter_config.json and adapter_model.safetensors.
        base: the base model's folder; its weights' shapes are what the adapter must fit.
        digest: SHA-256 the folder must have, where one is known. Raises StoreError for another: the stored
            copy is damaged, which says nothing about the version.
    """
    _check_files(folder)
    if digest is not None:
        check_whole(digest, folder)
    rank, targets = _read_config(folder / CONFIG)
    tensors = read_header(folder / WEIGHTS)
    layers = _base_layers(base)
    prefix, adapted = _check_names(tensors, layers, rank)
    _check_targets(prefix, adapted, layers, targets)
    _check_values(folder / WEIGHTS, tensors)


def _check_files(folder: Path) -> None:
    """Plain files of known names and bounded sizes: a link may change, and a pickle may run code."""
    entries = sorted(folder.iterdir())
    for entry in (folder, *entries):
        if entry.is_symlink():
            raise AdapterRefused(f"{entry.name} is a symbolic link.", remedy="Store the files themselves.")
    for entry in entries:
        allowed = _MAX_BYTES.get(entry.name)
        if allowed is None or not entry.is_file():
            raise AdapterRefused(
                f"{entry.name} does not belong into an adapter.", remedy=f"Store {CONFIG} and {WEIGHTS} only."
            )
        if (size := entry.stat().st_size) > allowed:
            raise AdapterRefused(f"{entry.name} has {size} bytes; {allowed} are allowed.", remedy=RETRAIN)


def _read_config(path: Path) -> tuple[int, str | list[str]]:
    """Rank and targets of a plain LoRA."""
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise AdapterRefused(f"{path.name} cannot be read: {error!r}.", remedy=RETRAIN) from error
    check_plain(config, path.name)
    rank, alpha = config["r"], config["lora_alpha"]
    if rank > MAX_RANK:
        raise AdapterRefused(
            f"{path.name} has rank {rank}; 1 to {MAX_RANK} can be served.", remedy="Train with a lower rank."
        )
    if alpha > MAX_ALPHA:
        raise AdapterRefused(
            f"{path.name} has lora_alpha {alpha}.", remedy=f"It must be above 0 and at most {MAX_ALPHA:g}."
        )
    return rank, config["target_modules"]


def _base_layers(base: Path) -> dict[str, tuple[int, ...]]:
    """[out, in] of every linear layer of the base's language model, by `layers.<n>.<block>.<projection>`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(base.glob("*.safetensors")):
        for name, tensor in read_header(file).items():
            if match := _BASE_KEY.fullmatch(name):
                shapes[match[1]] = tensor.shape
    if not shapes:
        raise AdapterRefused(
            "The base model's folder holds no language model to compare the adapter with.",
            remedy="Set HSCR_MODEL_PATH to the folder of the model that the engine serves.",
        )
    return shapes


def _check_names(
    tensors: Mapping[str, Tensor], layers: Mapping[str, tuple[int, ...]], rank: int
) -> tuple[str, set[str]]:
    """Every tensor is one half of a LoRA of an existing layer, in the right shape, beside its other half.

    Returns what precedes `layers.` in the modules' names, and the adapted layers.
    """
    prefix, adapted = None, set()
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or match["layer"] not in layers or match["prefix"] != (prefix or match["prefix"]):
            raise AdapterRefused(
                f"{name} changes no linear layer of this language model: engines would ignore it.",
                remedy="Adapt the language model's projections only.",
            )
        outputs, inputs = layers[match["layer"]]
        expected = (rank, inputs) if match["side"] == "A" else (outputs, rank)
        if tensor.shape != expected:
            raise AdapterRefused(
                f"{name} has shape {list(tensor.shape)}, not {list(expected)}.", remedy=RETRAIN
            )
        other = "B" if match["side"] == "A" else "A"
        if name.replace(f".lora_{match['side']}.", f".lora_{other}.") not in tensors:
            raise AdapterRefused(f"{name} lacks its other half, lora_{other}.", remedy=RETRAIN)
        prefix = match["prefix"]
        adapted.add(match["layer"])
    if prefix is None:
        raise AdapterRefused(f"{WEIGHTS} holds no tensors.", remedy=RETRAIN)
    return prefix, adapted


def _check_targets(
    prefix: str, adapted: set[str], layers: Mapping[str, tuple[int, ...]], targets: str | list[str]
) -> None:
    """The configuration targets exactly the layers that have weights; engines would fill up or drop some."""
    for layer in layers:
        if targeted(prefix + layer, targets) != (layer in adapted):
            what = "is a target without weights" if layer not in adapted else "has weights but is no target"
            raise AdapterRefused(f"{prefix}{layer} {what}.", remedy=RETRAIN)


def _check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    changes = False
    for name, values in read_values(path, tensors):
        if not np.isfinite(values).all():
            raise AdapterRefused(f"{name} holds NaN or infinity.", remedy=RETRAIN)
        changes |= ".lora_B." in name and bool(values.any())
    if not changes:
        raise AdapterRefused("Every lora_B is zero: the adapter changes nothing.", remedy=RETRAIN)
