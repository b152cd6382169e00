"""`hscr demo` as a newcomer runs it, on a smaller ward."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KEYS = {
    "answered", "preference_records", "adapter", "gate", "promoted", "base_score", "aligned_score",
    "difference_ci95", "sft_score", "random_negatives_score", "visual_dependence_base",
    "visual_dependence_aligned", "requests_during_swap", "failed_during_swap", "seconds",
}  # fmt: skip


@pytest.mark.demo
@pytest.mark.timeout(900)
def test_the_whole_loop_is_told_and_its_last_line_is_json(tmp_path: Path) -> None:
    command = ["demo", "--home", str(tmp_path / "home"), "--images", "40", "--test-images", "20"]
    done = subprocess.run(
        [sys.executable, "-c", "from hscr.cli import main; main()", *command],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("HSCR_")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values.keys() == KEYS
    assert values["answered"] == 200
    assert values["preference_records"] >= 40
    assert values["promoted"] is True
    assert values["gate"] in {"pass", "fail", "inconclusive"}
    assert values["requests_during_swap"] > 50
    assert values["failed_during_swap"] == 0
    assert (values["gate"] == "pass") != ("overrides it" in done.stdout)
    assert not (tmp_path / "home" / "stack.json").exists(), "the stack was stopped"
