"""The loop on files alone: rows, records, adapter, verdict; no service anywhere."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hscr.config import EvaluateConfig, FinetuneConfig, GateConfig, GenerateConfig, LoopConfig
from hscr.errors import InvalidRecord, NotFound
from hscr.local import ask, evaluate_adapter, finetune_records, generate_records
from hscr.records import GateVerdict
from hscr.stack import PHANTOM
from hscr.store.export import read_records
from tests.cli.running import hscr


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads on few cores wait for one another far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def records(samples: Path, random_negatives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records made by the command itself."""
    out = tmp_path_factory.mktemp("local") / "records"
    rows = ["--input", str(samples / "rows.jsonl"), "--config", str(random_negatives)]
    done = hscr("generate", *rows, "--out", str(out), "--json", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["records"] + done.stderr.count("skipped ") == 12
    return Path(said["path"])


def test_the_command_and_the_function_make_the_same_records(
    records: Path, samples: Path, random_negatives: Path, tmp_path: Path
) -> None:
    config = LoopConfig.from_toml(random_negatives).generate
    made = generate_records(PHANTOM, samples / "rows.jsonl", samples, tmp_path / "out", config)
    assert [r.but(created_at="2026-01-01T00:00:00Z") for r in read_records(made.exported.path)] == [
        r.but(created_at="2026-01-01T00:00:00Z") for r in read_records(records)
    ]


def test_an_adapter_is_trained_asked_and_judged(records: Path, samples: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    result = finetune_records(
        PHANTOM, records, tmp_path / "adapter", FinetuneConfig(epochs=4, batch_size=12),
        on_progress=lambda step, _steps, _metrics: steps.append(step),
    )  # fmt: skip
    assert steps == list(range(1, len(steps) + 1))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    image = (samples / "00.png").read_bytes()
    assert ask(PHANTOM, image, "Is there a nodule?", adapter=result.path)
    config = EvaluateConfig(
        images=2, dependence_questions=4, dependence_masks=1, gate=GateConfig(resamples=100)
    )
    compared = evaluate_adapter(PHANTOM, result.path, config)
    assert compared.judgement.verdict is GateVerdict.INCONCLUSIVE
    assert "at least 300" in compared.judgement.reasons[0]
    assert set(compared.scores) == {"base", "candidate"}
    assert compared.scores["base"]["visual_dependence"] != compared.scores["candidate"]["visual_dependence"]


def test_a_row_without_its_image_is_named(samples: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "none.png", "question": "What?", "answer": "Nothing."}\n')
    with pytest.raises(InvalidRecord, match=r"none\.png cannot be read"):
        generate_records(PHANTOM, rows, samples, tmp_path / "out", GenerateConfig())
    rows.write_text('{"image": "00.png", "question": "What?"}\n')
    with pytest.raises(InvalidRecord, match="Line 1 cannot be used: answer"):
        generate_records(PHANTOM, rows, samples, tmp_path / "out", GenerateConfig())


def test_records_without_their_images_are_refused(records: Path, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text(records.read_text())
    with pytest.raises(NotFound, match="is missing"):
        finetune_records(PHANTOM, tmp_path / "records.jsonl", tmp_path / "adapter", FinetuneConfig())
