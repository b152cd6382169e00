"""LLaVA's own checkpoint layout (haotian-liu/LLaVA, microsoft/LLaVA-Med v1.5): what it says and where."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig

from hscr.errors import InvalidCheckpoint, InvalidInput, NotFound
from hscr.models.convert.stated import read_json
from hscr.models.convert.weights import Weights

VISION = "vision_tower.vision_model."

_LANGUAGE: dict[str, type[Any]] = {
    "llava_mistral": MistralConfig,
    "llava_llama": LlamaConfig,
    "llava": LlamaConfig,
}
_LEGACY_ROPE = {"rope_theta", "rope_scaling"}
_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_KNOWN_TOWERS = {"openai/clip-vit-large-patch14-336": 336, "openai/clip-vit-large-patch14": 224}
_ONLY: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch", "cls_patch", None),
    "mm_use_im_start_end": (False, None),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("pad", "square", None),
    "quantization_config": (None,),
}
_RENAMES = (
    (r"model\.vision_tower\.(vision_tower\.)?vision_model\.", VISION),
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)
_SPELLINGS = (
    ("model.vision_tower.vision_tower.vision_model.", VISION),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# transformers checks the types of fields, but not all of their values.
_UNBUILDABLE = (
    StrictDataclassError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
)
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$")


@contextmanager
def refuse_unbuildable() -> Iterator[None]:
    """Around what makes a configuration or model of a config.json's values. Raises InvalidCheckpoint."""
    try:
        yield
    except _UNBUILDABLE as error:
        # The last line says what is wrong; those before it name the check that found it.
        reason = f"{type(error).__name__}: {error}".splitlines()[-1].strip()
        raise InvalidCheckpoint(
            f"No model can be made of what config.json says: {reason}.",
            remedy="Download it again, and that of the folder of --vision-tower.",
        ) from error


class Located(NamedTuple):
    """Where a tensor of the converted model comes from."""

    weights: Mapping[str, Tensor]
    name: str

    def read(self) -> Tensor:
        return self.weights[self.name]


@dataclasses.dataclass(frozen=True)
class Original:
    """A checkpoint in the original layout, with its vision tower wherever that is."""

    folder: Path
    raw: dict[str, Any]
    vision: CLIPVisionConfig
    tower: Path | None
    tensors: dict[str, Located]
    """by the name each has in the hub's layout"""
    files: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path, tower: Path | None = None, *, replace_tower: bool = False) -> Self:
        """tower: a CLIP model in the hub's layout; its weights serve where the checkpoint has none.

        Raises NotFound, InvalidCheckpoint, InvalidInput.
        """
        if replace_tower and tower is None:
            raise InvalidInput(
                "No vision tower was named to take the checkpoint's place.",
                remedy="Name its folder with --vision-tower, or leave --replace-vision-tower out.",
            )
        raw = _read_config(folder)
        weights = Weights(folder)
        tensors = {_rename(name): Located(weights, name) for name in weights if not _COMPUTED.search(name)}
        own_tower = any(name.startswith(VISION) for name in tensors)
        files = [*weights.files]
        if tower is not None and (replace_tower or not own_tower):
            beside = Weights(tower)
            kept = {name: where for name, where in tensors.items() if not name.startswith(VISION)}
            tensors = kept | _tower_tensors(beside)
            files += beside.files
        elif not own_tower:
            raise NotFound(
                f"{folder} holds no vision tower; its configuration names {raw.get('mm_vision_tower')}.",
                remedy="Download that model and name its folder with --vision-tower.",
            )
        return cls(folder, raw, _vision_config(raw, tower), tower, tensors, tuple(files))

    @property
    @refuse_unbuildable()
    def language(self) -> Any:
        """Configuration of the language model alone, as transformers reads it. Raises InvalidCheckpoint."""
        return _language_class(self.raw).from_dict(self.raw)

    @refuse_unbuildable()
    def config(self, vocabulary: int, image_token_id: int, pad_token_id: int) -> LlavaConfig:
        """Of the converted model, whose embeddings have `vocabulary` rows. Raises InvalidCheckpoint."""
        kind = _language_class(self.raw)
        known = {field.name for field in dataclasses.fields(kind)} | _LEGACY_ROPE
        text = {name: value for name, value in self.raw.items() if name in known}
        text |= {"vocab_size": vocabulary, "pad_token_id": pad_token_id}
        text = {name: value for name, value in text.items() if name not in {"architectures", "torch_dtype"}}
        whole = self.raw.get("mm_vision_select_feature") == "cls_patch"
        return LlavaConfig(
            vision_config=self.vision,
            text_config=kind(**text),
            image_token_index=image_token_id,
            image_seq_length=(self.vision.image_size // self.vision.patch_size) ** 2 + whole,
            projector_hidden_act="gelu",
            vision_feature_layer=self._vision_layer(),
            vision_feature_select_strategy="full" if whole else "default",
        )

    def _vision_layer(self) -> int:
        """Whose output is shown to the language model; the tower's input counts as the first."""
        layer = self.raw.get("mm_vision_select_layer", -2)
        depth = self.vision.num_hidden_layers
        if layer not in range(-depth - 1, depth + 1):
            raise InvalidCheckpoint(
                f"config.json says mm_vision_select_layer = {layer!r}; the vision tower has {depth} layers.",
                remedy="Name the tower that the checkpoint was trained with by --vision-tower.",
            )
        return int(layer)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise NotFound(f"{folder} holds no config.json.", remedy="Give the folder of a LLaVA checkpoint.")
    raw = read_json(file)
    if "text_config" in raw:
        raise InvalidCheckpoint(
            f"{folder} is in the hub's layout already.", remedy="Use it as it is; nothing is to convert."
        )
    _language_class(raw)
    for name, allowed in _ONLY.items():
        if raw.get(name) not in allowed:
            raise InvalidCheckpoint(
                f"config.json says {name} = {raw.get(name)!r}; this converts only {_either(allowed)}.",
                remedy="Give a checkpoint of LLaVA 1.5 or LLaVA-Med 1.5.",
            )
    return raw


def _language_class(raw: dict[str, Any]) -> type[Any]:
    kind = raw.get("model_type")
    if kind not in tuple(_LANGUAGE):
        raise InvalidCheckpoint(
            f"config.json says model_type = {kind!r}; this converts only {_either(tuple(_LANGUAGE))}.",
            remedy="Give a checkpoint of LLaVA 1.5 or LLaVA-Med 1.5.",
        )
    return _LANGUAGE[str(kind)]


def _either(allowed: tuple[Any, ...]) -> str:
    return " or ".join("none" if value is None else repr(value) for value in allowed)


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        found = re.match(pattern, name)
        if found:
            return replacement + name[found.end() :]
    return name


def original_name(name: str) -> str:
    """How the original layout spells a tensor of the hub's."""
    for own, public in _SPELLINGS:
        if name.startswith(public):
            return own + name.removeprefix(public)
    return name


def _tower_tensors(weights: Weights) -> dict[str, Located]:
    """A CLIP folder's vision half: saved whole, alone, or alone by transformers 5, which drops the prefix."""
    nested = any(name.startswith("vision_model.") for name in weights)
    return {
        VISION + name.removeprefix("vision_model."): Located(weights, name)
        for name in weights
        if (name.startswith("vision_model.") or not nested) and not _COMPUTED.search(name)
    }


@refuse_unbuildable()
def _vision_config(raw: dict[str, Any], tower: Path | None) -> CLIPVisionConfig:
    name = raw.get("mm_vision_tower")
    if tower is None:
        if name not in tuple(_KNOWN_TOWERS):
            raise NotFound(
                f"The shape of the vision tower {name!r} is not known.",
                remedy="Name the folder of that CLIP model with --vision-tower; its configuration is read.",
            )
        return CLIPVisionConfig(image_size=_KNOWN_TOWERS[str(name)], **_CLIP_LARGE)
    kind = read_json(tower / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise InvalidCheckpoint(
            f"{tower} holds no CLIP model (model_type = {kind!r}).",
            remedy=f"Give --vision-tower the folder of {name} in the hub's layout.",
        )
    return CLIPVisionConfig.from_pretrained(tower)
