"""What lies beside the weights of a converted model: configurations, tokenizer, processor, licence."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from hscr.models.convert.original import Original

_IMAGE_FIELDS = ("image_mean", "image_std", "resample", "rescale_factor")


def write_beside_weights(
    folder: Path,
    original: Original,
    config: LlavaConfig,
    *,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    dtype: torch.dtype,
) -> None:
    """Write everything but the weights and the card."""
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
        image_processor=image_processor(original),
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
    `expand2square` of llava/mm_utils.py, so that nothing is cropped away.
    """
    size = original.vision.image_size
    stated = _stated(original.tower)
    shape = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    if original.raw.get("image_aspect_ratio") == "pad":
        return LlavaImageProcessorPil(do_pad=True, **shape, **stated)
    return CLIPImageProcessorPil(**shape, **stated)


def _stated(tower: Path | None) -> dict[str, Any]:
    file = tower / "preprocessor_config.json" if tower else None
    stated = json.loads(file.read_text()) if file and file.is_file() else {}
    return {name: stated[name] for name in _IMAGE_FIELDS if name in stated}
