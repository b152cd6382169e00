"""What `hscr ablate` and `hscr recipes` say; what they do is tested in tests/ablate."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hscr.cli.app import app
from hscr.config import LoopConfig
from hscr.errors import Conflict, InvalidConfig


def said(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_help_teaches() -> None:
    shown = said("ablate", "--help")
    assert "hscr ablate --suite mask --seeds 3" in shown
    assert "mask      Table 5" in shown


def test_recipes_are_listed_and_resolved() -> None:
    assert "hscr-llava-med-rate-0.3" in said("recipes")
    resolved = LoopConfig.parse(json.loads(said("recipes", "hscr-llava-med-pixel")))
    assert resolved == LoopConfig.from_toml(Path("hscr-llava-med-pixel"))


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="hscr-llava-med"):
        said("ablate", "--suite", "mask", "--config", "hscr-lava-med", "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_in_the_way_of_the_folder_is_refused(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Conflict, match=rf"{out} cannot be made: .*--out"):
        said("ablate", "--suite", "mask", "--out", str(tmp_path / out))
