"""`hscr up --engine vllm`: the same product on a real vLLM."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hscr.processes import marked
from tests.cli.running import Up, token_of

pytestmark = pytest.mark.vllm


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Up]:
    running = Up.start(tmp_path / "home", "--engine", "vllm")
    yield running
    assert running.process.poll() is not None or running.stop() == 0


def test_a_stack_on_vllm_answers_and_stops_whole(stack: Up, samples: Path) -> None:
    token = token_of(stack.at["processes"]["gateway"])
    assert stack.at["engine"] == "vllm"
    answer = stack.json("ask", str(samples / "00.png"), "Is there a nodule?")
    assert answer["text"].split()[0].strip(",.") in {"Yes", "No"}
    provenance = answer["provenance"]
    assert (provenance["model"], provenance["numeric_mode"]) == ("phantom", "cpu/float32")
    assert provenance["engine"].startswith("vllm/")
    assert stack.stop() == 0
    assert marked(token) == []
