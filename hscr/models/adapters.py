"""LoRA adapters on the language model of a LLaVA, and on nothing else of it.

Adapters touch only the linear layers of the language model: an engine such as vLLM silently ignores
weights for the projector or the vision tower, so the served model would not be the trained one.
"""

import copy
import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hscr.config import FinetuneConfig
from hscr.errors import AdapterRefused, Conflict, NotFound
from hscr.models.plain_lora import RETRAIN, check_plain, targeted

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<side>lora_A|lora_B)\.weight")


class Adapters:
    """The adapters attached to one model. At most one is active; not thread-safe, as the model is shared."""

    def __init__(self, model: Any) -> None:
        self.active: str | None = None
        self._model = model
        self._peft: Any = None
        self._names: set[str] = set()
        self._trained: list[nn.Module] = []
        """whose mode matters to training"""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._names))

    def load(self, folder: str | Path, name: str) -> None:
        """Attach the adapter saved in `folder` under `name`, inactive.

        Raises Conflict for a used name, AdapterRefused for one that does not fit this model.
        """
        config, weights = read_adapter(folder, self._model)
        self._attach(name, config, seed=0)
        with self.use(name):
            fit = peft.set_peft_model_state_dict(self._peft, weights, adapter_name=_key(name))
        absent = [key for key in fit.missing_keys if _key(name) in key]
        if absent or fit.unexpected_keys:
            self.unload(name)
            raise AdapterRefused(
                f"Targets and weights differ, as at {(absent + fit.unexpected_keys)[0]}.", remedy=RETRAIN
            )

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises NotFound for an unknown name, Conflict for the active one."""
        self._require(name)
        if name == self.active:
            raise Conflict(f"Adapter {name} is in use.", remedy="Unload it after the work that uses it.")
        self._names.remove(name)
        if self._names:
            # PEFT warns when it must choose another adapter to be the active one itself.
            self._peft.set_adapter(_key(min(self._names)))
        self._peft.delete_adapter(_key(name))
        self._activate(self.active)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Answer with adapter `name` inside the block; None is the base model. Raises NotFound."""
        before = self.active
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    @contextmanager
    def train(self, name: str, config: FinetuneConfig) -> Iterator[dict[str, nn.Parameter]]:
        """Attach a fresh adapter, active and trainable inside the block, gone after it.

        Yields its parameters by name. B starts at zero, so the model starts equal to its base; A is drawn
        from `config.seed` without touching the caller's random state.
        """
        lora = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=LORA_TARGETS
        )
        self._attach(name, lora, seed=config.seed)
        self._trained = [
            module
            for path, module in self._model.named_modules()
            if ".lora_dropout." in path or isinstance(module, GradientCheckpointingLayer)
        ]
        try:
            with self.use(name):
                self.train_mode()
                yield self._trainable(name)
        finally:
            self.train_mode(False)
            self._model.activation_checkpointing_disable()
            self.unload(name)

    def train_mode(self, mode: bool = True) -> None:
        """Only LoRA's dropout is random, so a fresh adapter equals its base; layers may be checkpointed."""
        for module in self._trained:
            module.training = mode

    def shell(self) -> Any:
        """The model as PEFT wraps it, for a trainer that saves and loads adapters by it.

        A copy of the outermost object alone: accelerate marks what it prepares and replaces its forward, and
        a second run would find it marked. Its `train` is `train_mode`, as trainers call it before each step.
        """

        def train(mode: bool = True) -> Any:
            self.train_mode(mode)
            return shell

        shell = copy.copy(self._peft)
        shell.train = train
        return shell

    def save(self, name: str, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write PEFT's two files; their bytes depend on the weights and the configuration only.

        state: the model's weights, where they are gathered from several processes. Raises OSError.
        """
        self._require(name)
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        state = peft.get_peft_model_state_dict(self._peft, state, adapter_name=_key(name))
        state = {key: value.detach().cpu().contiguous() for key, value in sorted(state.items())}
        try:
            save_file(state, out / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{out / WEIGHTS} cannot be written: {error}") from error
        config = self._peft.peft_config[_key(name)].to_dict()
        # A local path would name this machine, and change the digest of equal weights.
        config |= {"base_model_name_or_path": None, "inference_mode": True}
        (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")

    def _attach(self, name: str, config: Any, seed: int) -> None:
        if name in self._names:
            raise Conflict(f"Adapter {name} is already loaded.", remedy="Use another name or unload it.")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            torch.manual_seed(seed)
            if self._peft is None:
                self._peft = peft.get_peft_model(self._model, config, adapter_name=_key(name))
            else:
                self._peft.add_adapter(_key(name), config)
        self._names.add(name)
        self._model.eval()
        self._activate(self.active)

    def _activate(self, name: str | None) -> None:
        if name is not None:
            self._require(name)
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(_key(name))
        elif self._peft is not None:
            self._peft.base_model.disable_adapter_layers()
        self.active = name

    def _trainable(self, name: str) -> dict[str, nn.Parameter]:
        found = {key: value for key, value in self._model.named_parameters() if value.requires_grad}
        strays = [key for key in found if not re.match(LORA_TARGETS + rf"\.lora_[AB]\.{_key(name)}\.", key)]
        if strays or not found:
            raise AdapterRefused(
                f"LoRA would train {strays or 'nothing'}.",
                remedy="Use a model whose language model is called language_model.",
            )
        return found

    def _require(self, name: str) -> None:
        if name not in self._names:
            raise NotFound(f"Adapter {name} is not loaded.", remedy="Load it first, or name a loaded one.")


def read_adapter(folder: str | Path, model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of a saved adapter, checked against the model it shall change.

    Raises AdapterRefused that names the file or tensor: not a plain LoRA, a layer that the model lacks or
    that is no linear layer of the language model, a wrong shape, a missing half, NaN or infinity.
    """
    path = Path(folder)
    try:
        settings = json.loads((path / CONFIG).read_bytes())
        check_plain(settings, CONFIG)
        config = peft.LoraConfig.from_pretrained(str(path))
        weights = load_file(path / WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise AdapterRefused(f"No adapter can be read: {error}", remedy=RETRAIN) from error
    if not weights:
        raise AdapterRefused(f"{WEIGHTS} holds no weights.", remedy=RETRAIN)
    modules = dict(model.named_modules())
    for key, value in weights.items():
        _check_tensor(key, value, config.r, modules, weights)
    _check_targets(settings["target_modules"], modules, weights)
    return config, weights


def _check_targets(
    targets: str | list[str], modules: dict[str, nn.Module], weights: dict[str, Tensor]
) -> None:
    """Before PEFT wraps anything: what it has wrapped, in the vision tower say, stays wrapped."""
    adapted = {match["module"] for match in map(_KEY.fullmatch, weights) if match}
    for name, module in modules.items():
        adaptable = isinstance(getattr(module, "base_layer", module), nn.Linear)
        if adaptable and targeted(name, targets) != (name in adapted):
            what = "is a target without weights" if name not in adapted else "has weights but is no target"
            raise AdapterRefused(f"{name} {what}.", remedy=RETRAIN)


def _check_tensor(
    key: str, value: Tensor, rank: int, modules: dict[str, nn.Module], weights: dict[str, Tensor]
) -> None:
    match = _KEY.fullmatch(key)
    module = modules.get(match["module"]) if match else None
    layer = getattr(module, "base_layer", module)
    if match is None or not re.fullmatch(LORA_TARGETS, match["module"]) or not isinstance(layer, nn.Linear):
        raise AdapterRefused(f"{key} names no linear layer of the language model.", remedy=RETRAIN)
    first = match["side"] == "lora_A"
    expected = (rank, layer.in_features) if first else (layer.out_features, rank)
    if tuple(value.shape) != expected:
        raise AdapterRefused(f"{key} has shape {tuple(value.shape)}, not {expected}.", remedy=RETRAIN)
    if key.replace(*(("lora_A", "lora_B") if first else ("lora_B", "lora_A"))) not in weights:
        raise AdapterRefused(f"{key} lacks its other half.", remedy=RETRAIN)
    if not torch.isfinite(value).all():
        raise AdapterRefused(f"{key} holds NaN or infinity.", remedy=RETRAIN)


def _key(name: str) -> str:
    # PEFT's names become module names, where a dot is not allowed and "lora" confuses its own lookups.
    return f"adapter_{hashlib.sha256(name.encode()).hexdigest()[:16]}"
