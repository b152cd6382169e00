"""Writing the weights of a converted model, one shard at a time and none twice."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from hscr.durable import sync
from hscr.errors import InvalidCheckpoint
from hscr.models.convert.original import VISION, Located, original_name, refuse_unbuildable

Shape = tuple[int, ...]
Advance = Callable[[int, int], None]
"""Bytes done, bytes in all."""

_EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_HUB = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", VISION),
)
_CONVERTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REMEDY = (
    "Give a complete checkpoint, with LoRA merged and not quantised, and name the CLIP model it was trained "
    "with by --vision-tower."
)
_SHOWN = 8


class Target(NamedTuple):
    """One tensor of the converted model."""

    name: str
    source: Located
    rows: int | None
    """of embeddings and head, which may grow; None for every other tensor"""
    dtype: torch.dtype
    size: int
    """bytes"""

    def make(self) -> Tensor:
        """Raises InvalidCheckpoint when a value is not finite in the new dtype."""
        tensor = self.source.read()
        if self.rows is not None:
            tensor = grow(tensor, self.rows)
        tensor = tensor.to(self.dtype).contiguous()
        if not tensor.isfinite().all():
            raise InvalidCheckpoint(
                f"{self.source.name} holds values that are not finite as {self.dtype}.",
                remedy="Download the weights again; if they are finite as stored, choose --dtype bfloat16.",
            )
        return tensor


def grow(tensor: Tensor, rows: int) -> Tensor:
    """[V, d] → [rows, d]: each new row is the mean of the present ones.

    A new token's logit is then the mean logit, so it is never the likeliest, and by Jensen's inequality k new
    tokens take at most k / V of the others' mass: every log-prob falls by log(1 + k / V) at most.
    """
    mean = tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def hub_name(name: str) -> str:
    """Of a parameter of LlavaForConditionalGeneration, in the files that transformers 4 and 5 and vLLM read.

    transformers 5 itself saves the vision tower without `vision_model`, which vLLM does not find.
    """
    for own, public in _HUB:
        if name.startswith(own):
            return public + name.removeprefix(own)
    return name


def targets(
    tensors: Mapping[str, Located], config: LlavaConfig, present_rows: int, dtype: torch.dtype | None
) -> list[Target]:
    """What has to be written, in the model's order.

    present_rows: of embeddings and head before they grow to the config's vocabulary.
    dtype: None is that of the embeddings as they are stored.
    Raises InvalidCheckpoint that lists missing, unexpected, misshapen and quantised tensors by name.
    """
    wanted = _wanted_shapes(config)
    given, dtypes = _stored(tensors)
    stored = {name: (present_rows, *wanted[name][1:]) for name in _EMBEDDINGS}
    complaints = [
        *_complain("missing", [original_name(name) for name in wanted if name not in given]),
        *_complain("unexpected", [tensors[name].name for name in given if name not in wanted]),
        *_complain(
            "misshapen",
            [
                f"{tensors[name].name} {list(given[name])} instead of {list((wanted | stored)[name])}"
                for name in wanted
                if name in given and given[name] != (wanted | stored)[name]
            ],
        ),
        *_complain(
            "quantised or no real numbers",
            [
                f"{tensors[name].name} {dtypes[name]}"
                for name in wanted
                if name in dtypes and dtypes[name] not in _CONVERTED
            ],
        ),
    ]
    if complaints:
        raise InvalidCheckpoint(
            f"The weights do not fit config.json. {'. '.join(complaints)}.",
            remedy=_REMEDY,
        )
    dtype = dtype or dtypes[_EMBEDDINGS[0]]
    return [
        Target(name, tensors[name], shape[0] if name in _EMBEDDINGS else None, dtype, _bytes(shape, dtype))
        for name, shape in wanted.items()
    ]


def write(folder: Path, plan: list[Target], limit: int, advance: Advance) -> int:
    """Write shards of at most `limit` bytes (one larger tensor is a shard of its own) and their index.

    A shard that is there is complete, for it was on the disk before it was renamed into place; it is not
    written again. Returns the number of shards. Peak memory beside the mapped source: two shards at most,
    where the dtype changes.
    """
    shards = list(_split(plan, limit))
    total = sum(target.size for target in plan)
    done = 0
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = _shard_name(number, len(shards))
        if not (folder / file).exists():
            aside = folder / f"{file}.writing"
            save_file({target.name: target.make() for target in shard}, aside, metadata={"format": "pt"})
            sync(aside)
            aside.rename(folder / file)
            sync(folder)
        where |= dict.fromkeys((target.name for target in shard), file)
        done += sum(target.size for target in shard)
        advance(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return len(shards)


def _split(plan: list[Target], limit: int) -> Iterator[list[Target]]:
    shard: list[Target] = []
    for target in plan:
        if shard and sum(each.size for each in shard) + target.size > limit:
            yield shard
            shard = []
        shard.append(target)
    yield shard


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _stored(tensors: Mapping[str, Located]) -> tuple[dict[str, Shape], dict[str, torch.dtype]]:
    shapes, dtypes = {}, {}
    for name, where in tensors.items():
        tensor = where.read()
        shapes[name], dtypes[name] = tuple(tensor.shape), tensor.dtype
    return shapes, dtypes


@refuse_unbuildable()
def _wanted_shapes(config: LlavaConfig) -> dict[str, Shape]:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return {hub_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _complain(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"]
