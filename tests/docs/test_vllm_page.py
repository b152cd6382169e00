"""docs/vllm.md says how the launcher starts vLLM, and how the engines differ, as the code has it."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from hscr.serving import Serving
from tests.engine.differences import DIFFERENCES

PAGE = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()


def test_the_command_for_production_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSCR_VLLM_COMMAND", sys.executable)
    serving = Serving(Path("/models/base"), "base", 8100, host="0.0.0.0", device="cuda", dtype="bfloat16")
    command = serving.command("vllm")
    shown = re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    assert shown is not None
    words = shlex.split(shown[1].replace("\\\n", " "))
    at = words.index("vllm")
    assert dict(word.split("=") for word in words[:at]) == command.environment
    assert words[at:] == ["vllm", "serve", *command.arguments[1:]]


def test_every_difference_is_listed() -> None:
    section = PAGE.partition("## Where the engines differ")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (vLLM|embedded) \| ([^|]+?) \|", section, re.MULTILINE)
    listed = {(engine.lower(), name) for engine, name in rows}
    assert listed == {(engine, name) for engine, names in DIFFERENCES.items() for name in names}
