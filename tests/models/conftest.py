"""A tiny random model, loaded once."""

from pathlib import Path

import pytest

from hscr.models.vlm import VLM
from tests.models.converting import Checkpoint, make
from tests.tiny_llava import build


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def vlm(folder: Path) -> VLM:
    return VLM.load(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """An original LLaVA-Med of a few thousand parameters."""
    return make(tmp_path)
