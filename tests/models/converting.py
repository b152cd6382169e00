"""What the tests of `hscr convert` share: a checkpoint on disk, and the original's view of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from hscr.models.convert.convert import Converted, Options, convert
from hscr.models.convert.text import IMAGE
from tests.original_llava import NESTED, Parts, sentencepieces, write_original, write_tower

QUESTION = "Is there a nodule?\nWhere (≥ 3 mm)?"
MISTRAL = f"[INST] {IMAGE}\n{QUESTION} [/INST]"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    f"detailed, and polite answers to the user's questions. USER: {IMAGE}\n{QUESTION} ASSISTANT:"
)


Change = Callable[[dict[str, Tensor]], object]


class Checkpoint(NamedTuple):
    parts: Parts
    folder: Path
    tower: Path
    out: Path


def quiet(stage: str, done: int, total: int) -> None:
    assert 0 < done <= total, stage


def run(checkpoint: Checkpoint, **options: Any) -> Converted:
    options = {"vision_tower": checkpoint.tower} | options
    return convert(checkpoint.folder, checkpoint.out, Options(**options), quiet)


def make(
    folder: Path,
    change: Change = lambda _: None,
    *,
    kind: str = "llava_mistral",
    spelling: str | None = NESTED,
    **form: Any,
) -> Checkpoint:
    """Write a checkpoint, with tensors changed by a function before they are written."""
    parts = Parts.random(len(sentencepieces()), kind)
    tensors = parts.tensors(spelling)
    change(tensors)
    original = write_original(folder / "original", parts, tensors, **form)
    return Checkpoint(parts, original, write_tower(folder / "clip", parts), folder / "converted")


def reconfigure(checkpoint: Checkpoint, **changes: Any) -> None:
    file = checkpoint.folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def padded(image: Image.Image) -> Image.Image:
    """A square of CLIP's mean colour with the image in its middle: LLaVA's `expand2square`."""
    square = Image.new("RGB", (max(image.size),) * 2, (122, 116, 104))
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square


def original_pixels(image: Image.Image) -> Tensor:
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return CLIPImageProcessorPil(**size)(images=padded(image), return_tensors="pt")["pixel_values"]
