"""Whether an adapter may come near an engine, read from its bytes alone, without torch.

An engine accepts NaN, layers that do not exist and wrong shapes with status 200, and one such adapter can
spoil the answers of others; weights outside the language model it ignores without a word. So everything is
checked here first: when an adapter is made, and again beside every engine that is to load it.

The format: 8 bytes of little-endian header length, a JSON header of name -> {dtype, shape, data_offsets},
then the tensors' bytes without gaps (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hscr.errors import AdapterRefused
from hscr.store.blobs import folder_digest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 64
MAX_BYTES = 2 << 30
_MAX_HEADER = 100 << 20

_PROJECTIONS = r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
_BASE_KEY = re.compile(rf"(?:.*\.)?language_model\.(?:model\.)?(layers\.\d+\.{_PROJECTIONS})\.weight")
_KEY = re.compile(
    r"base_model\.model\.(?P<module>(?:model\.)?language_model\.(?:model\.)?"
    rf"(?P<layer>layers\.\d+\.{_PROJECTIONS}))\.lora_(?P<side>[AB])\.weight"
)
# What makes an adapter more than plain LoRA, with the value that plain LoRA has.
_PLAIN = {
    "bias": ("none",),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "use_rslora": (False,),
}
_RETRAIN = "Train it again with this program, from the base model that is served."


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_adapter(folder: Path, base: Path, *, digest: str | None = None) -> None:
    """Raises AdapterRefused, naming file or tensor, unless `folder` is a plain, finite LoRA of `base`.

    Args:
        folder: PEFT's adapter_config.json and adapter_model.safetensors.
        base: the base model's folder; its weights' shapes are what the adapter must fit.
        digest: SHA-256 the folder must have, where one is known.
    """
    if digest is not None and folder_digest(folder) != digest:
        raise AdapterRefused(
            f"The files of adapter {digest[:12]} are not those that were stored.",
            remedy="Restore them from a backup, or train a new version.",
        )
    rank, targets = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    tensors, data = _read_header(path), _data_start(path)
    layers = _base_layers(base)
    modules = _check_names(tensors, layers, rank)
    _check_targets(modules, layers, targets)
    _check_values(path, tensors, data)


def _read_config(path: Path) -> tuple[int, Any]:
    """Rank and targets of a plain LoRA."""
    try:
        config = json.loads(path.read_bytes())
        rank, alpha, targets = config["r"], config["lora_alpha"], config["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterRefused(f"{path.name} cannot be read: {error!r}.", remedy=_RETRAIN) from error
    if config.get("peft_type") != "LORA":
        raise AdapterRefused(f"{path.name} describes {config.get('peft_type')}, not LORA.", remedy=_RETRAIN)
    for key, plain in _PLAIN.items():
        if key in config and config[key] not in plain:
            raise AdapterRefused(f"{path.name} sets {key}: engines serve plain LoRA only.", remedy=_RETRAIN)
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise AdapterRefused(
            f"{path.name} has rank {rank}; 1 to {MAX_RANK} can be served.", remedy="Train with a lower rank."
        )
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise AdapterRefused(f"{path.name} has lora_alpha {alpha}.", remedy="It must be a positive number.")
    return rank, targets


def _read_header(path: Path) -> dict[str, _Tensor]:
    """Tensor names, types and places. The places must fill the file exactly, so a truncated one is found."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # A header that is cut off is no JSON.
            header = json.loads(file.read(min(length, _MAX_HEADER)))
        tensors = {
            name: _Tensor(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        _require_filled(tensors, size - 8 - length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterRefused(f"{path.name} cannot be read: {error}.", remedy=_RETRAIN) from error
    if size > MAX_BYTES:
        raise AdapterRefused(f"{path.name} has {size} bytes; {MAX_BYTES} are allowed.", remedy=_RETRAIN)
    if not tensors:
        raise AdapterRefused(f"{path.name} holds no tensors.", remedy=_RETRAIN)
    return tensors


def _require_filled(tensors: dict[str, _Tensor], size: int) -> None:
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
        if tensor.begin != at or tensor.end < tensor.begin:
            raise ValueError(f"{name} overlaps another tensor or leaves a gap")
        at = tensor.end
    if at != size:
        raise ValueError(f"it holds {size} bytes of weights where its header promises {at}")


def _data_start(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _base_layers(base: Path) -> dict[str, tuple[int, ...]]:
    """[out, in] of every linear layer of the base's language model, by `layers.<n>.<block>.<projection>`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(base.glob("*.safetensors")):
        for name, tensor in _read_header(file).items():
            if match := _BASE_KEY.fullmatch(name):
                shapes[match[1]] = tensor.shape
    if not shapes:
        raise AdapterRefused(
            "The base model's folder holds no language model to compare the adapter with.",
            remedy="Set HSCR_MODEL_PATH to the folder of the model that the engine serves.",
        )
    return shapes


def _check_names(
    tensors: dict[str, _Tensor], layers: dict[str, tuple[int, ...]], rank: int
) -> dict[str, str]:
    """Every tensor is one half of a LoRA of an existing layer, in the right shape, beside its other half.

    Returns the full module name of each adapted layer.
    """
    modules: dict[str, str] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or match["layer"] not in layers:
            raise AdapterRefused(
                f"{name} changes no linear layer of this language model: engines would ignore it.",
                remedy="Adapt the language model's projections only.",
            )
        outputs, inputs = layers[match["layer"]]
        expected = (rank, inputs) if match["side"] == "A" else (outputs, rank)
        if tensor.shape != expected:
            raise AdapterRefused(
                f"{name} has shape {list(tensor.shape)}, not {list(expected)}.", remedy=_RETRAIN
            )
        other = "B" if match["side"] == "A" else "A"
        if name.replace(f".lora_{match['side']}.", f".lora_{other}.") not in tensors:
            raise AdapterRefused(f"{name} lacks its other half, lora_{other}.", remedy=_RETRAIN)
        modules[match["layer"]] = match["module"]
    return modules


def _check_targets(modules: dict[str, str], layers: dict[str, tuple[int, ...]], targets: Any) -> None:
    """The configuration targets exactly the layers that have weights; engines would fill up or drop some."""
    prefix = next(iter(modules.values())).partition("layers.")[0]
    for layer in layers:
        if _targeted(prefix + layer, targets) != (layer in modules):
            what = "is a target without weights" if layer not in modules else "has weights but is no target"
            raise AdapterRefused(f"{prefix}{layer} {what}.", remedy=_RETRAIN)


def _targeted(module: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _check_values(path: Path, tensors: dict[str, _Tensor], data: int) -> None:
    changes = False
    for name, values in _values(path, tensors, data):
        if not np.isfinite(values).all():
            raise AdapterRefused(f"{name} holds NaN or infinity.", remedy=_RETRAIN)
        changes |= ".lora_B." in name and bool(values.any())
    if not changes:
        raise AdapterRefused("Every lora_B is zero: the adapter changes nothing.", remedy=_RETRAIN)


def _values(path: Path, tensors: dict[str, _Tensor], data: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise AdapterRefused(f"{name} has type {tensor.dtype}.", remedy="Save F32, F16 or BF16.")
            file.seek(data + tensor.begin)
            raw = np.frombuffer(file.read(tensor.end - tensor.begin), _DTYPES[tensor.dtype])
            if raw.size != math.prod(tensor.shape):
                raise AdapterRefused(f"{name} has too many or too few bytes.", remedy=_RETRAIN)
            yield name, _float32(raw)


_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def _float32(raw: NDArray[Any]) -> NDArray[np.float32]:
    if raw.dtype == _DTYPES["BF16"]:  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)
