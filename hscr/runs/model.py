"""The model that a run answers with: where it computes, and with which adapter. Imports torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from hscr.errors import InvalidInput, NotFound
from hscr.models.vlm import VLM


def load(model: Path, device: str, dtype: str, *, quantize: Literal["nf4"] | None = None) -> VLM:
    """`auto` is CUDA and bfloat16 where there is a GPU, else CPU and float32. Raises NotFound,
    InvalidInput.

    Each process of `accelerate launch` takes the GPU of its own rank.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidInput(
            "torch finds no CUDA device here.", remedy="Leave --device out, or install a torch with CUDA."
        )
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    rank = os.environ.get("LOCAL_RANK", "0") if device == "cuda" else None
    return VLM.load(model, device if rank is None else f"cuda:{rank}", dtype, quantize=quantize)


@contextmanager
def attached(vlm: VLM, adapter: Path | None, name: str) -> Iterator[str | None]:
    """The name under which the adapter folder is loaded inside the block; None without one."""
    if adapter is None:
        yield None
        return
    vlm.load_adapter(adapter_folder(adapter), name)
    try:
        yield name
    finally:
        vlm.unload_adapter(name)


def adapter_folder(path: Path) -> Path:
    """Raises NotFound when it holds no adapter."""
    if not (path / "adapter_config.json").is_file():
        raise NotFound(f"{path} holds no adapter.", remedy="Give a folder that `hscr finetune` wrote.")
    return path
