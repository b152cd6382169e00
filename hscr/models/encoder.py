"""A LLaVA without its language model: prompt, vision tower and projector.

A scorer that leaves the language model to the engine needs no more: of LLaVA's seven billion parameters
these are a twentieth.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from hscr.errors import NotFound
from hscr.models.chat import Chat, context_length
from hscr.models.digest import model_digest
from hscr.models.language import tokens_at_once
from hscr.models.processor import read_processor
from hscr.models.sight import Sight, numeric_mode
from hscr.models.vision import Vision
from hscr.models.vocabulary import Vocabulary

_TOWER, _PROJECTOR = "vision_tower.", "multi_modal_projector."
_INNER = "vision_model."
"""what some versions of transformers and vLLM have between the tower and its layers"""


class Encoder(Chat, Sight):
    """Sees and tokenises as the VLM of the same folder does, bit for bit."""

    def __init__(self, vision: Vision, processor: Any, config: Any, digest: str) -> None:
        self.vision = vision
        self.device = vision.device
        self.tokens_at_once = tokens_at_once(vision.device)
        self.digest = digest
        self.numeric_mode = numeric_mode(vision.device, vision.dtype)
        Chat.__init__(self, processor, config.image_token_id, self.image_token_count, context_length(config))

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", dtype: str = "float32") -> Self:
        """Read a model folder in the hub's layout, and of its weights tower and projector only.

        Raises NotFound when the folder lacks one of them.
        """
        digest, config = model_digest(path), AutoConfig.from_pretrained(path)
        tower = AutoModel.from_config(config.vision_config, attn_implementation="sdpa")
        projector = LlavaMultiModalProjector(config)
        for module, prefix in ((tower, _TOWER), (projector, _PROJECTOR)):
            _fill(module, _weights(Path(path), prefix), path)
            module.to(device, getattr(torch, dtype)).eval().requires_grad_(False)
        return cls(Vision(tower, projector, config), read_processor(path), config, digest)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What each id of the tokenizer says."""
        return Vocabulary.read(self.tokenizer, len(self.tokenizer))


def _fill(module: torch.nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """`post_layernorm` of a tower may be absent: nothing behind it is looked at."""
    missing, _ = module.load_state_dict(weights, strict=False)
    if lacking := [name for name in missing if not name.startswith("post_layernorm.")]:
        raise NotFound(
            f"{path} lacks weights: {lacking[:3]}.",
            remedy="Give the folder of a LLaVA saved with its vision tower and projector.",
        )


def _weights(folder: Path, part: str) -> dict[str, Tensor]:
    """Tensors whose name contains `part`, by what follows it; nothing else is read from the files."""
    found: dict[str, Tensor] = {}
    for file in _files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                if part in name:
                    found[name.partition(part)[2].removeprefix(_INNER)] = tensors.get_tensor(name)
    return found


def _files(folder: Path) -> list[Path]:
    """One file of weights, or those that the index of several names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    names = json.loads(index.read_text())["weight_map"]
    return sorted({folder / file for name, file in names.items() if _TOWER in name or _PROJECTOR in name})
