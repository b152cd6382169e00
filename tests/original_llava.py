"""A random LLaVA of a few thousand parameters in its authors' own layout, for tests of its conversion."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.convert_slow_tokenizer import import_protobuf

from tests.tiny_llava import CORPUS

NESTED = "model.vision_tower.vision_tower.vision_model."
FLAT = "model.vision_tower.vision_model."
_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


@dataclass
class Parts:
    """The model in the pieces that LLaVA's own code puts together."""

    kind: Literal["llava_mistral", "llava", "llava_llama"]
    language: Any
    projector: nn.Sequential
    vision: Any

    @classmethod
    def random(cls, vocabulary: int, kind: Any = "llava_mistral", seed: int = 0) -> "Parts":
        torch.manual_seed(seed)
        shared = {**_SHAPE, "vocab_size": vocabulary, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
        if kind == "llava_mistral":
            rope = {"rope_type": "default", "rope_theta": 1e6}
            config = MistralConfig(**shared, num_key_value_heads=2, sliding_window=None, rope_parameters=rope)
            language: Any = MistralForCausalLM(config)
        else:
            language = LlamaForCausalLM(LlamaConfig(**shared, num_key_value_heads=4))
        vision = CLIPVisionModel(CLIPVisionConfig(**_SHAPE, image_size=32, patch_size=8))
        projector = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        parts = cls(kind, language.eval(), projector, vision.eval())
        with torch.no_grad():
            for parameter in parts.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        return parts

    def parameters(self) -> list[nn.Parameter]:
        modules = (self.language, self.projector, self.vision)
        return [parameter for module in modules for parameter in module.parameters()]

    def tensors(self, spelling: str | None = NESTED) -> dict[str, Tensor]:
        """Named as the original names them; no vision tower when its spelling is None."""
        named = dict(self.language.state_dict())
        named |= {f"model.mm_projector.{name}": t for name, t in self.projector.state_dict().items()}
        if spelling is not None:
            named |= {spelling + name: t for name, t in self.vision.state_dict().items()}
            named[f"{spelling}embeddings.position_ids"] = torch.arange(17)[None]
        named["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        return {name: tensor.detach().clone() for name, tensor in named.items()}

    @torch.no_grad()
    def logits(self, pieces: list[list[int]], pixel_values: Tensor) -> Tensor:
        """[L, V] of one prompt whose image stands between two pieces of text, as llava_arch.py has it."""
        states = self.vision(pixel_values, output_hidden_states=True).hidden_states
        image = self.projector(states[-2][:, 1:])[0]
        before, after = (self.language.model.embed_tokens(torch.tensor(piece)) for piece in pieces)
        embeds = torch.cat([before, image, after])
        return self.language(inputs_embeds=embeds[None]).logits[0]


def original_config(parts: Parts, **changes: Any) -> dict[str, Any]:
    """config.json as transformers 4 wrote it for LLaVA's code."""
    text = parts.language.config
    plain = ("num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act")
    return {
        "architectures": ["LlavaMistralForCausalLM"],
        "model_type": parts.kind,
        **_SHAPE,
        **{name: getattr(text, name) for name in plain},
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.36.2",
        "use_cache": True,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "tokenizer_model_max_length": 2048,
        **changes,
    }


def write_original(
    folder: Path, parts: Parts, tensors: dict[str, Tensor], *, form: str = "safetensors", shards: int = 1
) -> Path:
    """form: `safetensors`, `bin`, or `legacy_bin` (the format before torch 1.6)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(original_config(parts)))
    write_sentencepiece(folder / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True, **special})
    )
    name = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    stem, suffix = name.split(".")
    names = list(tensors)
    where = {}
    for number in range(shards):
        file = name if shards == 1 else f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}"
        part = {key: tensors[key] for key in names[number::shards]}
        where |= dict.fromkeys(part, file)
        if form == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization=form == "bin")
    if shards > 1:
        (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_tower(folder: Path, parts: Parts, *, prefix: str = "vision_model.") -> Path:
    """The CLIP model beside it in the hub's layout, with the text half that the hub's files have as well."""
    folder.mkdir(parents=True, exist_ok=True)
    parts.vision.config.save_pretrained(folder)
    tensors = {prefix + name: t.detach().clone() for name, t in parts.vision.state_dict().items()}
    text_half = {"text_model.final_layer_norm.bias": torch.ones(4)} if prefix else {}
    save_file(tensors | text_half, folder / "model.safetensors", metadata={"format": "pt"})
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def sentencepieces() -> list[tuple[str, float, int]]:
    """Piece, score and type, laid out as Llama's: control, bytes, merges by falling score, characters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=140, show_progress=False)
    trained.train_from_iterator([*CORPUS * 4, "[INST] [/INST] USER: ASSISTANT:"], trainer)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    merged = [piece for piece in pieces if len(piece) > 1]
    learnt = [*merged, *(piece for piece in pieces if len(piece) == 1)]
    return [
        ("<unk>", 0.0, _UNKNOWN),
        ("<s>", 0.0, _CONTROL),
        ("</s>", 0.0, _CONTROL),
        *((f"<0x{byte:02X}>", 0.0, _BYTE) for byte in range(256)),
        *((piece, -float(rank), _NORMAL) for rank, piece in enumerate(learnt)),
    ]


def write_sentencepiece(file: Path, *, model_type: int = 2) -> None:
    model = import_protobuf().ModelProto()
    for piece, score, kind in sentencepieces():
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = model_type
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    file.write_bytes(model.SerializeToString())


def sentencepiece_ids(text: str) -> list[int]:
    """SentencePiece's BPE by its definition: while two neighbours make a piece, join the best, leftmost."""
    known = {piece: (score, number) for number, (piece, score, _) in enumerate(sentencepieces())}
    parts = list(("▁" + text).replace(" ", "▁"))
    while pairs := [
        (known["".join(pair)][0], -at)
        for at, pair in enumerate(itertools.pairwise(parts))
        if "".join(pair) in known
    ]:
        at = -max(pairs)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    ids = []
    for part in parts:
        pieces = [part] if part in known else [f"<0x{byte:02X}>" for byte in part.encode()]
        ids += [known[piece][1] for piece in pieces]
    return ids
