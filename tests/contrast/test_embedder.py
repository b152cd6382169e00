"""Sentence embeddings behind similarity (algorithms §6: 13)."""

import json
import math
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from hscr.config import RerankConfig
from hscr.contrast.embedder import PACKAGED, SentenceEmbedder, packaged_folder
from hscr.contrast.rerank import similarities
from hscr.errors import DependencyMissing, InvalidConfig
from hscr.models.digest import model_digest

CONFIG = RerankConfig(similarity="sentence_embedding")
TEXTS = ["a small nodule in the left lung", "yes", "the right lung is clear, and so is the left one"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT in the layout of sentence-transformers, which reads 10 tokens."""
    folder = tmp_path_factory.mktemp("minilm")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*" ".join(TEXTS).split(), ","})]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=0.5, **shape
    )
    BertModel(config).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 10}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


def test_13_an_embedding_is_the_mean_of_the_real_tokens_as_a_unit_vector(tiny: Path) -> None:
    found = SentenceEmbedder.find(str(tiny)).embed(TEXTS)
    assert found.dtype == torch.float32
    model, tokenizer = AutoModel.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        ids = [*ids[:9], ids[-1]] if len(ids) > 10 else ids
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=0)


def test_13_similarity_is_the_rescaled_cosine_symmetric_bounded_and_one_with_itself(tiny: Path) -> None:
    embedder = SentenceEmbedder.find(str(tiny))
    vectors = embedder.embed(TEXTS)
    for i, first in enumerate(TEXTS):
        scores = similarities(first, TEXTS, CONFIG, embedder)
        for j, second in enumerate(TEXTS):
            assert 0 <= scores[j] <= 1
            assert scores[j] == pytest.approx((1 + float(vectors[i] @ vectors[j])) / 2, abs=1e-4)
            assert scores[j] == pytest.approx(similarities(second, [first], CONFIG, embedder)[0], abs=1e-4)
        assert scores[i] == 1
    assert len({round(score, 2) for score in similarities(TEXTS[0], TEXTS, CONFIG, embedder)}) == 3


class Corners:
    """Texts as directions a right angle and half a turn apart: what a caller may plug in."""

    identity = "corners@1"

    def embed(self, texts: Sequence[str]) -> Tensor:
        angles = torch.tensor(
            [{"same": 0.0, "right": math.pi / 2, "opposite": math.pi}[text] for text in texts]
        )
        return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_13_opposite_is_0_and_a_right_angle_one_half() -> None:
    assert similarities("same", ["opposite", "right", "same"], CONFIG, Corners()) == [0.0, 0.5, 1.0]


def test_the_identity_names_the_weights(tiny: Path, tmp_path: Path) -> None:
    assert SentenceEmbedder.find(str(tiny)).identity == f"{tiny.name}@{model_digest(tiny)}"
    other = tmp_path / tiny.name
    shutil.copytree(tiny, other)
    model = BertModel.from_pretrained(other)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.add_(1e-3)
    model.save_pretrained(other)
    assert SentenceEmbedder.find(str(other)).identity != SentenceEmbedder.find(str(tiny)).identity


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="holds no model") as error:
        SentenceEmbedder.find(str(tmp_path))
    assert "all-MiniLM-L6-v2" in error.value.remedy


def test_another_pooling_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cls"
    shutil.copytree(tiny, folder)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(InvalidConfig, match="does not average"):
        SentenceEmbedder.find(str(folder))


@pytest.mark.skipif(
    find_spec(PACKAGED["all-MiniLM-L6-v2"]) is None, reason="the packaged MiniLM is not installed"
)
def test_13_the_packaged_model_gives_its_published_similarities() -> None:
    embedder = SentenceEmbedder.find("all-MiniLM-L6-v2")
    assert embedder.identity.startswith("all-MiniLM-L6-v2@")
    texts = ["That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    # Cosines that Hugging Face's and Redis's documentation print for this model.
    published = [0.6945774, 0.9429151, 0.2568761]
    found = similarities("That is a happy person", texts, CONFIG, embedder)
    assert found == pytest.approx([(1 + cosine) / 2 for cosine in published], abs=1e-4)


def test_a_missing_package_says_what_to_do() -> None:
    with pytest.raises(DependencyMissing, match="no_such_embedder is not installed") as error:
        packaged_folder("no_such_embedder")
    assert "--no-deps no-such-embedder" in error.value.remedy
    assert "corley_mihalcea" in error.value.remedy
