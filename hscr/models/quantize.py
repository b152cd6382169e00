"""A base model whose language model's weights are held in four bits (QLoRA, arXiv 2305.14314)."""

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from hscr.errors import DependencyMissing

_WHOLE = ["vision_tower", "multi_modal_projector", "lm_head"]


def nf4(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`: NormalFloat4 with doubly quantised scales, computing in `dtype`.

    Vision tower, projector and head stay whole. Raises DependencyMissing without bitsandbytes.
    """
    if find_spec("bitsandbytes") is None:
        raise DependencyMissing(
            "nf4 needs bitsandbytes, which is not installed.",
            remedy="Install the extra: pip install 'hscr[qlora]'.",
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_WHOLE,
    )
    return {"quantization_config": config, "device_map": {"": device}}
