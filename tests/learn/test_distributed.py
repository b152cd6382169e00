"""Two processes that share a step's records take the same steps as one, also if each holds half a model."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hscr.models.vlm import VLM
from tests.learn.one_process import CONFIGS
from tests.learn.one_shard import FSDP, ZERO
from tests.learn.records import records, run, weights

ROOT = Path(__file__).parents[2]


def launched(
    module: str, folder: Path, out: Path, environment: Mapping[str, str], *kinds: str
) -> subprocess.CompletedProcess[str]:
    """Two processes of `python -m MODULE FOLDER OUT KIND...`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*torchrun, "-m", module, folder, out, *(kinds or CONFIGS)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def launch(module: str, folder: Path, out: Path, environment: Mapping[str, str], *kinds: str) -> Path:
    """The folder that they wrote to."""
    done = launched(module, folder, out, environment, *kinds)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each process holds the whole model."""
    return launch("tests.learn.one_process", folder, tmp_path_factory.mktemp("two"), {})


@pytest.fixture(scope="module")
def sharded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch("tests.learn.one_shard", folder, tmp_path_factory.mktemp("shards"), FSDP)


def compared(vlm: VLM, launched: Path, out: Path, kind: str) -> tuple[dict[str, Any], Any]:
    """What the first process told, and the result of one alone, which must have taken the same steps.

    Seven records, four at a step, one at a time: the second step of an epoch leaves one process with one
    record too few.
    """
    first, second = (json.loads((launched / f"{kind}.{rank}.json").read_text()) for rank in (0, 1))
    result, history = run(vlm, CONFIGS[kind], out, pairs=records(7))
    assert second["history"] == []  # only the first process reports
    assert first["metrics"] == second["metrics"]
    assert len(first["history"]) == len(history) == 4
    for found, expected in zip(first["history"], history, strict=True):
        for row in (found, expected):
            row.pop("rewards/accuracies")  # at the first step the sign of a rounding error
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    one, two = weights(out), weights(launched / kind)
    assert float((one - two).norm() / one.norm()) < 1e-3
    return first, result


@pytest.mark.parametrize("kind", CONFIGS)
def test_two_processes_equal_one(vlm: VLM, whole: Path, tmp_path: Path, kind: str) -> None:
    first, result = compared(vlm, whole, tmp_path / "one", kind)
    for item, other in zip(first["probe"]["items"], result.probe["items"], strict=True):
        assert item["token_logprobs_adapter"] == pytest.approx(other["token_logprobs_adapter"], abs=1e-3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_two_halves_of_a_model_equal_a_whole_one(vlm: VLM, sharded: Path, tmp_path: Path, kind: str) -> None:
    first, _ = compared(vlm, sharded, tmp_path / "one", kind)
    assert first["sharded"] == ["True, FSDPPeftModel, DTensor"]
    assert first["probe"] == {"items": []}, "no process has what answers"


@pytest.fixture
def deepspeed() -> None:
    """By hand: DeepSpeed is no dependency, because PyPI has only its sources."""
    pytest.importorskip("deepspeed", reason="DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", ZERO)
@pytest.mark.parametrize("kind", CONFIGS)
def test_two_processes_under_deepspeed_equal_one(
    vlm: VLM, folder: Path, tmp_path: Path, kind: str, stage: str
) -> None:
    out = tmp_path / "two"
    out.mkdir()
    launch("tests.learn.one_shard", folder, out, ZERO[stage], kind)
    first, _ = compared(vlm, out, tmp_path / "one", kind)
    assert first["sharded"] == [f"{stage == '3'}, DeepSpeedEngine, Parameter"]


@pytest.mark.usefixtures("deepspeed")
def test_weights_that_zero_3_would_not_gather_are_refused_before_training(
    folder: Path, tmp_path: Path
) -> None:
    environment = {**ZERO["3"], "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"}
    done = launched("tests.learn.one_shard", folder, tmp_path, environment, "online")
    assert done.returncode != 0
    assert "zero3_save_16bit_model: true" in done.stderr
    assert not list(tmp_path.iterdir())
