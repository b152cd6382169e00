"""Which of PEFT's settings make a plain LoRA, the only kind that engines serve. Imports no torch."""

import re
from collections.abc import Mapping
from typing import Any

from hscr.errors import AdapterRefused

RETRAIN = "Train it again with this program, from the base model that is served."

# Settings that change nothing of a plain LoRA's answers. Every other one must be off: engines differ in
# which they know, and ignore what they do not.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision", "target_modules",
    "task_type",
}  # fmt: skip
_OFF: tuple[Any, ...] = (None, False, [], {}, "none")
# Initialisations that leave the base model's weights as they are; others, such as PiSSA, move a part of them.
_ADDED = (True, False, "gaussian")


def check_plain(config: object, file: str) -> None:
    """Raises AdapterRefused, naming `file` and the setting, unless `config` describes a plain LoRA."""
    if not isinstance(config, Mapping):
        raise AdapterRefused(f"{file} cannot be read: it holds no object.", remedy=RETRAIN)
    absent = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if absent:
        raise AdapterRefused(f"{file} cannot be read: it lacks {absent[0]}.", remedy=RETRAIN)
    if config.get("peft_type") != "LORA":
        raise AdapterRefused(f"{file} describes {config.get('peft_type')}, not LORA.", remedy=RETRAIN)
    for key, value in config.items():
        plain = value in _ADDED if key == "init_lora_weights" else key in _HARMLESS or value in _OFF
        if not plain:
            raise AdapterRefused(f"{file} sets {key}: engines serve plain LoRA only.", remedy=RETRAIN)
    _check_numbers(config, file)
    _check_targets(config["target_modules"], file)


def targeted(module: str, targets: str | list[str]) -> bool:
    """Whether PEFT would adapt the module of this name."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _check_numbers(config: Mapping[str, Any], file: str) -> None:
    rank, alpha, dropout = config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1:
        raise AdapterRefused(f"{file} has rank {rank}.", remedy="It must be a whole number from 1 on.")
    if type(alpha) not in (int, float) or not 0 < alpha < float("inf"):
        raise AdapterRefused(f"{file} has lora_alpha {alpha}.", remedy="It must be a number above 0.")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise AdapterRefused(f"{file} has lora_dropout {dropout}.", remedy="It must be from 0 to below 1.")


def _check_targets(targets: object, file: str) -> None:
    """An expression, or a list of names."""
    try:
        usable = bool(re.compile(targets)) if isinstance(targets, str) else _are_names(targets)
    except (re.error, RecursionError) as error:
        raise AdapterRefused(f"{file} has no usable target_modules: {error}.", remedy=RETRAIN) from error
    if not usable:
        raise AdapterRefused(f"{file} has no usable target_modules.", remedy=RETRAIN)


def _are_names(targets: object) -> bool:
    return isinstance(targets, list) and bool(targets) and all(isinstance(name, str) for name in targets)
