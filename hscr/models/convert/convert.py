"""`convert`: LLaVA's own checkpoint layout in, a folder that `VLM.load`, transformers and vLLM open out.

Order: read and check all shapes, write beside the target, load what was written and compare it with the
source, rename. Nothing appears under the target's name before all checks have passed.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from hscr.errors import Conflict, InvalidCheckpoint, InvalidInput
from hscr.models.convert import shards, verify
from hscr.models.convert.card import card
from hscr.models.convert.folder import image_processor, write_beside_weights
from hscr.models.convert.original import Original
from hscr.models.convert.text import (
    TEMPLATES,
    Template,
    choose_template,
    converted_tokenizer,
    original_tokenizer,
)
from hscr.models.vlm import VLM

_IDENTITY = "conversion.txt"

Progress = Callable[[str, int, int], None]
"""Stage (`write` or `verify`), bytes done, bytes in all."""


@dataclass(frozen=True)
class Options:
    vision_tower: Path | None = None
    """a CLIP model in the hub's layout; needed when the checkpoint holds no tower or an unknown one"""
    replace_vision_tower: bool = False
    """use that folder's weights even where the checkpoint has its own"""
    template: Template | Literal["auto"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: as stored"""
    max_shard_bytes: int = 4 * 10**9
    vocabulary_multiple: int = 1
    """round the rows of embeddings and head up to a multiple of this"""
    device: str = "cpu"
    """where the converted model is loaded for its checks"""


class Converted(NamedTuple):
    """What was made and what was checked."""

    path: Path
    digest: str
    parameters: int
    tensors: int
    shards: int
    dtype: str
    template: Template
    vision: dict[str, str]
    """SHA-256 of the first and last vision layer, equal in source and result"""
    logits_difference: float
    """of the language model, text only, from the original's"""
    prompts: int
    """questions whose ids equal the original code's"""
    canary: verify.Canary


def convert(source: Path, out: Path, options: Options, on_progress: Progress) -> Converted:
    """Convert the checkpoint in `source` to the new folder `out`.

    Peak memory: writing, two shards at most; checking, the model once, in its dtype. A conversion that was
    cut off goes on with the shards it has.
    Raises NotFound, InvalidCheckpoint, InvalidInput, DependencyMissing, Conflict.
    """
    target = _replaceable(out)
    _require_device(options.device)
    original = Original.open(source, options.vision_tower, replace_tower=options.replace_vision_tower)
    tokenizer = converted_tokenizer(source)
    config = original.config(
        _rows(original, tokenizer, options.vocabulary_multiple),
        tokenizer.convert_tokens_to_ids("<image>"),
        tokenizer.pad_token_id,
    )
    plan = shards.targets(original.tensors, config, original.language.vocab_size, _dtype(options))
    template = choose_template(original.raw["model_type"]) if options.template == "auto" else options.template
    processor = image_processor(original)
    aside = _prepare(target, _identity(original, options))
    count = shards.write(
        aside, plan, options.max_shard_bytes, lambda done, total: on_progress("write", done, total)
    )
    write_beside_weights(
        aside,
        original,
        config,
        tokenizer=tokenizer,
        processor=processor,
        template=TEMPLATES[template],
        dtype=plan[0].dtype,
    )
    vlm = VLM.load(aside, device=options.device, dtype=_name(plan[0].dtype))
    done = Converted(
        path=out,
        digest=vlm.digest,
        parameters=sum(parameter.numel() for parameter in vlm.model.parameters()),
        tensors=len(plan),
        shards=count,
        dtype=_name(plan[0].dtype),
        template=template,
        vision=verify.same_weights(vlm, plan, lambda done, total: on_progress("verify", done, total)),
        logits_difference=verify.same_language(vlm, original),
        prompts=verify.same_prompts(vlm, original),
        canary=verify.look(vlm),
    )
    (aside / "README.md").write_text(card(source.name, done._asdict()), encoding="utf-8")
    (aside / _IDENTITY).unlink()
    _rename(aside, target)
    return done


def _replaceable(out: Path) -> Path:
    """What `out` leads to, and what is replaced by a rename when all is done."""
    target = out.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Conflict(f"{out} is not empty.", remedy="Name a new folder with --out.")
    if target.is_mount():
        raise Conflict(
            f"{out} is a mounted volume, which no folder can replace.",
            remedy="Name a new folder on it with --out.",
        )
    return target


def _require_device(device: str) -> None:
    try:
        torch.ones(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InvalidInput(
            f"This torch and this machine have no device {device!r}.",
            remedy="Name another with --device, such as cpu.",
        ) from error


def _rename(aside: Path, target: Path) -> None:
    try:
        aside.rename(target)
    except OSError as error:
        raise Conflict(
            f"{target} cannot be replaced: {error.strerror}.",
            remedy=f"The model is complete in {aside}; move it to where you want it.",
        ) from error


def _rows(original: Original, tokenizer: PreTrainedTokenizerFast, multiple: int) -> int:
    """Of embeddings and head: at least the original's, one for each token, rounded up."""
    present: int = original.language.vocab_size
    if (known := len(original_tokenizer(original.folder))) > present:
        raise InvalidCheckpoint(
            f"The tokenizer has {known} tokens, the model {present}.",
            remedy="Download the tokenizer that belongs to these weights.",
        )
    return -(-max(present, len(tokenizer)) // multiple) * multiple


def _dtype(options: Options) -> torch.dtype | None:
    return None if options.dtype == "auto" else getattr(torch, options.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _prepare(out: Path, identity: str) -> Path:
    """The unfinished folder beside `out`, emptied unless it was begun by this very conversion."""
    aside = out.parent / f".{out.name}.unfinished"
    note = aside / _IDENTITY
    if aside.exists() and not (note.is_file() and note.read_text() == identity):
        shutil.rmtree(aside)
    aside.mkdir(parents=True, exist_ok=True)
    note.write_text(identity)
    return aside


def _identity(original: Original, options: Options) -> str:
    """What decides every byte of every shard: the files as they are now, and the options."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in original.files]
    return json.dumps(
        [original.raw, files, options.dtype, options.max_shard_bytes, options.vocabulary_multiple]
    )
