"""What a converted model is given: the original's text, ids and pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hscr.models.convert.text import IMAGE, converted_tokenizer, original_tokenizer
from hscr.models.vlm import VLM
from tests.models.converting import (
    MISTRAL,
    QUESTION,
    VICUNA,
    Checkpoint,
    make,
    original_pixels,
    reconfigure,
    run,
)
from tests.original_llava import (
    sentencepiece_ids,
    sentencepieces,
    write_sentencepiece,
)
from tests.tiny_llava import CORPUS, picture


@pytest.mark.parametrize("text", [*CORPUS, QUESTION, "[INST] ", "  two  spaces ", "ünïcode ≥ 肺", "\n"])
def test_sentencepiece_models_read_as_sentencepiece_defines(tmp_path: Path, text: str) -> None:
    write_sentencepiece(tmp_path / "tokenizer.model")
    tokenizer = original_tokenizer(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert ids == [1, *sentencepiece_ids(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_tokenizer_json_that_spaces_only_the_start_is_read_as_pieces(checkpoint: Checkpoint) -> None:
    """LLaVA 1.5's is so: the text behind an image would lose the space that the original gave it."""
    backend = json.loads(original_tokenizer(checkpoint.folder).backend_tokenizer.to_str())
    scheme = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    backend |= {"normalizer": None, "pre_tokenizer": scheme}
    (checkpoint.folder / "tokenizer.json").write_text(json.dumps(backend))
    assert run(checkpoint).prompts == 3
    before, after = MISTRAL.split(IMAGE)
    vlm = VLM.load(checkpoint.out)
    expected = [1, *sentencepiece_ids(before), vlm.image_token_id, *sentencepiece_ids(after)]
    assert vlm.prompt_ids(QUESTION) == expected


@pytest.mark.parametrize(
    ("kind", "template", "expected"),
    [
        ("llava_mistral", "auto", f"<s>{MISTRAL} Yes. </s>[INST] Sure? [/INST]"),
        ("llava", "auto", f"<s>{VICUNA} Yes.</s>USER: Sure? ASSISTANT:"),
        ("llava", "llava_med", f"<s>{MISTRAL} Yes. </s>[INST] Sure? [/INST]"),
    ],
)
def test_templates_are_those_of_the_original_code(
    tmp_path: Path, kind: str, template: str, expected: str
) -> None:
    made = make(tmp_path, kind=kind)
    run(made, template=template)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": "Sure?"},
    ]
    vlm = VLM.load(made.out)
    assert vlm.processor.apply_chat_template(turns, add_generation_prompt=True) == expected


def test_padding_has_a_token_of_its_own_unless_the_original_had_one(checkpoint: Checkpoint) -> None:
    added = converted_tokenizer(checkpoint.folder)
    count = len(sentencepieces())
    assert (added.convert_tokens_to_ids(IMAGE), added.pad_token, added.pad_token_id) == (
        count,
        "<pad>",
        count + 1,
    )
    (checkpoint.folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "<unk>"}}')
    kept = converted_tokenizer(checkpoint.folder)
    assert (kept.pad_token_id, len(kept)) == (0, count + 1)


@pytest.mark.parametrize("size", [(60, 25), (25, 60), (40, 40)])
def test_pad_shows_the_whole_image_in_a_square(checkpoint: Checkpoint, size: tuple[int, int]) -> None:
    run(checkpoint)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    torch.testing.assert_close(VLM.load(checkpoint.out).pixel_values([image]), original_pixels(image))


def test_without_pad_the_centre_is_cropped(checkpoint: Checkpoint) -> None:
    reconfigure(checkpoint, image_aspect_ratio=None)
    run(checkpoint)
    image = picture(0, 60).crop((0, 0, 60, 30))
    found = VLM.load(checkpoint.out).pixel_values([image])
    assert not torch.allclose(found, original_pixels(image), atol=0.1)


def test_pixels_are_normalised_as_the_tower_says(checkpoint: Checkpoint) -> None:
    file = checkpoint.tower / "preprocessor_config.json"
    stated = json.loads(file.read_text()) | {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    file.write_text(json.dumps(stated))
    run(checkpoint)
    white = Image.new("RGB", (40, 40), "white")
    pixels = VLM.load(checkpoint.out).pixel_values([white])
    torch.testing.assert_close(pixels, torch.ones(1, 3, 32, 32))
