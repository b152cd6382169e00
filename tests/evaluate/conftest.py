import os
from pathlib import Path

import pytest

from hscr.evaluate.suites import Suite, phantom_suite


@pytest.fixture(scope="session")
def phantoms() -> Suite:
    return phantom_suite("development", 30, seed=3)


@pytest.fixture
def vqa_rad() -> Path:
    root = Path(os.environ.get("HSCR_DATA", Path(__file__).parents[3] / "shared" / "data"))
    folder = root / "vqa_rad"
    if not folder.is_dir():
        pytest.skip(f"no VQA-RAD in {root}; point HSCR_DATA at a folder that holds vqa_rad/")
    return folder
