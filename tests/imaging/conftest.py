import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file


@pytest.fixture
def dicom() -> Callable[[str], bytes]:
    """A file of pydicom or pydicom-data by name, from the installed packages, never from the network."""

    def read(name: str) -> bytes:
        path = get_testdata_file(name, download=False)
        assert path is not None, f"{name} is not in the installed packages"
        return Path(path).read_bytes()

    return read


@pytest.fixture
def vqa_rad() -> Path:
    root = Path(os.environ.get("HSCR_DATA", Path(__file__).parents[3] / "shared" / "data"))
    folder = root / "vqa_rad"
    if not folder.is_dir():
        pytest.skip(f"no VQA-RAD in {root}; point HSCR_DATA at a folder that holds vqa_rad/")
    return folder
