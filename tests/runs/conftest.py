"""A tiny random model and rows about noise."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny_llava import build, picture

QUESTIONS = ["is there a nodule?", "what does this image show?", "which organ?", "is the lung clear?"]
ANSWERS = [
    "yes, there is a small nodule.",
    "a large effusion on the right.",
    "brain mr with an infarct.",
    "no.",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "input")


def write_rows(folder: Path) -> Path:
    """16 rows about 16 images; `rows.jsonl` beside them."""
    folder.mkdir()
    listed = []
    for number in range(16):
        picture(number).save(folder / f"{number}.png")
        said = {"question": QUESTIONS[number % 4], "answer": ANSWERS[number % 3]}
        listed.append({"id": f"q{number}", "image": f"{number}.png", **said, "answer_type": "OPEN"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    return folder / "rows.jsonl"
