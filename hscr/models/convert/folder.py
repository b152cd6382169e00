"""What lies beside the weights of a converted model: configurations, tokenizer, processor, licence."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from hscr.errors import InvalidCheckpoint
from hscr.models.convert.original import Original
from hscr.models.convert.stated import read_json


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


_IMAGE_FIELDS: dict[str, Callable[[Any], bool]] = {
    "image_mean": _is_colour,
    "image_std": _is_colour,
    "resample": lambda value: value in tuple(Image.Resampling),
    "rescale_factor": _is_number,
}


def write_beside_weights(
    folder: Path,
    original: Original,
    config: LlavaConfig,
    *,
    tokenizer: PreTrainedTokenizerFast,
    processor: Any,
    template: str,
    dtype: torch.dtype,
) -> None:
    """Write everything but the weights and the card. processor: of images."""
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = dtype
    config.save_pretrained(folder)
    # The original's sampling defaults are left out: vLLM would apply them to requests that state none.
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    LlavaProcessor(
        image_processor=processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    for name in ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"):
        if (original.folder / name).is_file():
            shutil.copyfile(original.folder / name, folder / name)
    if (original.folder / "README.md").is_file():
        shutil.copyfile(original.folder / "README.md", folder / "ORIGINAL-README.md")


def image_processor(original: Original) -> Any:
    """Resize the short edge, crop the centre, normalise: as the tower's own processor, else as CLIP's.

    `image_aspect_ratio: pad` (LLaVA 1.5, LLaVA-Med 1.5) first pads to a square with the mean colour, which is
    `expand2square` of llava/mm_utils.py, so that nothing is cropped away. Raises InvalidCheckpoint.
    """
    size = original.vision.image_size
    stated = _stated(original.tower)
    shape = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    if original.raw.get("image_aspect_ratio") == "pad":
        return LlavaImageProcessorPil(do_pad=True, **shape, **stated)
    return CLIPImageProcessorPil(**shape, **stated)


def _stated(tower: Path | None) -> dict[str, Any]:
    if tower is None:
        return {}
    file = tower / "preprocessor_config.json"
    found = {name: value for name, value in read_json(file).items() if name in _IMAGE_FIELDS}
    for name, value in found.items():
        if not _IMAGE_FIELDS[name](value):
            raise InvalidCheckpoint(
                f"{file} says {name} = {value!r}, which no image can be prepared by.",
                remedy="Download it again.",
            )
    return found
