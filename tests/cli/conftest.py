from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.running import Up, hscr


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantom images and rows.jsonl, as `hscr phantom sample` makes them."""
    folder = tmp_path_factory.mktemp("samples") / "drawn"
    done = hscr("phantom", "sample", "--out", str(folder), "--images", "4", "--questions", "3")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def random_negatives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that makes a record of every row, whatever the present model finds plausible."""
    path = tmp_path_factory.mktemp("config") / "loop.toml"
    path.write_text('[generate.substitute]\nnegatives = "random"\n')
    return path


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One whole stack for all tests that only use it."""
    running = Up.start(tmp_path_factory.mktemp("stack"))
    yield running
    assert running.process.poll() is not None or running.stop() == 0
