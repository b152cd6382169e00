"""Projected visual tokens as a client sends them: `torch.save` of a tensor, which is an archive of a pickle.

What arrives is measured before it is opened, opened without running code, and refused unless it is exactly
what the model's own tower would have made in shape and kind.
"""

import base64
import binascii
import io
import zipfile
from typing import Any

import torch
from torch import Tensor

from hscr.errors import InvalidImage
from hscr.models.vlm import VLM

_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
_LARGEST_ELEMENT = 4
_OVERHEAD = 64 * 1024
"""bytes of an archive beside its numbers"""
_REMEDY = (
    "Send base64 of torch.save(tensor [N, hidden size]), as the model's vision tower and projector make it."
)


def visual_tokens(encoded: str, vlm: VLM) -> Tensor:
    """[N, d] in the model's dtype, on its device. Raises InvalidImage for anything else.

    vLLM takes any number of rows and makes the prompt that long; this engine does not.
    """
    shape = (vlm.image_token_count, vlm.model.config.text_config.hidden_size)
    tensor = _load(_decode(encoded), largest=shape[0] * shape[1] * _LARGEST_ELEMENT + _OVERHEAD)
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.dtype not in _DTYPES:
        raise InvalidImage("`image_embeds` holds no dense floating-point tensor.", remedy=_REMEDY)
    if tuple(tensor.shape) != shape:
        raise InvalidImage(
            f"`image_embeds` has shape {list(tensor.shape)}; the model sees {list(shape)}.", remedy=_REMEDY
        )
    if not tensor.isfinite().all():
        raise InvalidImage("`image_embeds` holds numbers that are not finite.", remedy=_REMEDY)
    return tensor.to(vlm.device, vlm.model.dtype)


def _decode(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise InvalidImage("`image_embeds` is not valid base64.", remedy=_REMEDY) from error


def _load(data: bytes, *, largest: int) -> Any:
    """`largest` bounds the unpacked bytes, which a compressed archive would hide."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile as error:
        raise InvalidImage("`image_embeds` was not made by torch.save.", remedy=_REMEDY) from error
    if size > largest:
        raise InvalidImage(f"`image_embeds` unpacks to more than {largest} bytes.", remedy=_REMEDY)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # An archive that is broken or hostile fails in as many ways as there are readers in it.
        raise InvalidImage("`image_embeds` cannot be loaded.", remedy=_REMEDY) from error
