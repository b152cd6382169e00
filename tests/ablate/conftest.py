"""The embedded model and an ablation of a few seconds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hscr.ablate.bench import Bench
from hscr.ablate.setting import Setting
from hscr.config import LoopConfig
from hscr.models.vlm import VLM
from hscr.stack import PHANTOM

SMALL = Setting(
    records=24,
    mix="traffic",
    steps=3,
    loop=LoopConfig.parse(
        {
            "finetune": {"batch_size": 4},
            "evaluate": {"images": 3, "dependence_questions": 4, "dependence_masks": 1},
        }
    ),
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads on few cores wait for one another far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One folder for all tests that may share what was run."""
    return Bench(VLM.load(PHANTOM), SMALL, tmp_path_factory.mktemp("ablation"))


@pytest.fixture
def elsewhere(bench: Bench, tmp_path: Path) -> Bench:
    """The same model and setting with an empty folder."""
    return replace(bench, folder=tmp_path / "elsewhere")
