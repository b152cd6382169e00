"""`hscr convert` as a person has it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hscr.cli.app import app
from tests.cli.running import hscr
from tests.models.converting import make


def test_what_was_proved_is_shown(tmp_path: Path) -> None:
    made = make(tmp_path)
    command = ["convert", str(made.folder), "--vision-tower", str(made.tower), "--out"]

    said = CliRunner().invoke(app, [*command, str(made.out), "--max-shard-size", "60KB", "--json"])
    facts = json.loads(said.stdout)
    assert facts["template"] == "llava_med"
    assert facts["canary"]["change"] > 0.01
    assert len(list(made.out.glob("model-*.safetensors"))) == facts["shards"] > 1

    shown = CliRunner().invoke(app, [*command, str(tmp_path / "other")])
    assert "89 in 1 file(s)" in shown.stdout
    assert "write" in shown.stderr


@pytest.mark.parametrize("size", ["much", "0GB"])
def test_a_refusal_says_what_to_do(tmp_path: Path, size: str) -> None:
    refused = hscr("convert", str(tmp_path), "--out", str(tmp_path / "out"), "--max-shard-size", size)
    assert refused.returncode == 2
    assert "Write --max-shard-size as 4GB" in refused.stderr
