"""The seeing half of a model, loaded without the speaking half."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hscr.errors import NotFound
from hscr.models.encoder import Encoder
from hscr.models.vlm import VLM
from tests.tiny_llava import picture

QUESTION = "is there a nodule in the left lung?"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.load(folder)


def copied(folder: Path, to: Path, *, without: str) -> Path:
    """The model, less the weights whose name contains `without`."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if without not in name}
    assert 0 < len(kept) < len(weights)
    save_file(kept, to / "model.safetensors")
    return to


def test_it_sees_and_reads_as_the_whole_model(vlm: VLM, encoder: Encoder) -> None:
    images = {str(i): picture(i) for i in range(3)}
    whole, half = vlm.encode(images), encoder.encode(images)
    assert all(torch.equal(whole[name], half[name]) for name in images)
    assert encoder.prompt_ids(QUESTION) == vlm.prompt_ids(QUESTION)
    assert encoder.completion_ids("no, left.") == vlm.completion_ids("no, left.")
    assert (encoder.digest, encoder.numeric_mode) == (vlm.digest, vlm.numeric_mode)
    assert encoder.expanded(vlm.prompt_ids(QUESTION)).count(vlm.image_token_id) == vlm.image_token_count
    assert torch.equal(encoder.vocabulary.content, vlm.vocabulary.content)


def test_it_needs_no_weight_of_the_language_model(folder: Path, encoder: Encoder, tmp_path: Path) -> None:
    blind = copied(folder, tmp_path / "seeing", without="language_model")
    alone = Encoder.load(blind)
    pixels = alone.pixel_values([picture(1)])
    assert torch.equal(alone.visual_tokens(pixels), encoder.visual_tokens(pixels))
    with pytest.raises(NotFound):
        VLM.load(blind)


def test_it_holds_no_more_than_tower_and_projector(folder: Path, encoder: Encoder) -> None:
    weights = load_file(folder / "model.safetensors")
    seeing = sum(t.numel() for name, t in weights.items() if "vision_tower" in name or "projector" in name)
    assert encoder.vision.parameters == seeing < sum(t.numel() for t in weights.values())


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector.linear_2"])
def test_missing_weights_are_named(folder: Path, tmp_path: Path, part: str) -> None:
    with pytest.raises(NotFound, match="lacks weights"):
        Encoder.load(copied(folder, tmp_path / "less", without=part))


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower.", "vision_tower."])
def test_it_reads_the_layouts_of_all_versions(
    folder: Path, encoder: Encoder, tmp_path: Path, prefix: str
) -> None:
    moved = shutil.copytree(folder, tmp_path / "moved")
    weights = load_file(moved / "model.safetensors")
    renamed = {_renamed(name, prefix): tensor for name, tensor in weights.items()}
    assert any(name.startswith(prefix) for name in renamed)
    save_file(renamed, moved / "model.safetensors")
    pixels = encoder.pixel_values([picture(2)])
    assert torch.equal(Encoder.load(moved).visual_tokens(pixels), encoder.visual_tokens(pixels))


def _renamed(name: str, prefix: str) -> str:
    _, found, rest = name.partition("vision_tower.")
    return prefix + rest.removeprefix("vision_model.") if found else name


def test_weights_in_several_files_are_found_by_their_index(
    folder: Path, vlm: VLM, encoder: Encoder, tmp_path: Path
) -> None:
    vlm.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and not (tmp_path / file.name).exists():
            shutil.copy(file, tmp_path)
    pixels = encoder.pixel_values([picture(2)])
    assert torch.equal(Encoder.load(tmp_path).visual_tokens(pixels), encoder.visual_tokens(pixels))
