"""The loop on files alone: rows, records, adapter, verdict; no service anywhere."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hscr.config import EvaluateConfig, FinetuneConfig, GateConfig, LoopConfig
from hscr.errors import Conflict, HscrError, InvalidInput, InvalidQuestion, InvalidRecord, NotFound
from hscr.local import ask, evaluate_adapter, finetune_records
from hscr.records import GateVerdict
from hscr.rows.source import open_rows
from hscr.runs.run import generate_records
from hscr.stack import PHANTOM
from hscr.store.export.form import Form
from hscr.store.export.read import read_records
from hscr.store.export.write import export
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
    assert said["rows"] == said["records"] + said["skipped"] == 12
    assert done.stderr.count("skipped ") == said["skipped"]
    return Path(said["path"])


def test_the_command_and_the_function_make_the_same_records(
    records: Path, samples: Path, random_negatives: Path, tmp_path: Path
) -> None:
    config = LoopConfig.from_toml(random_negatives).generate
    summary = generate_records(PHANTOM, open_rows(str(samples)), tmp_path / "out", config)
    told = json.loads((records / "summary.json").read_text())
    assert json.loads(summary.model_dump_json()) == told


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


def test_records_in_any_of_our_forms_train_the_same_adapter(records: Path, tmp_path: Path) -> None:
    export(read_records(records), tmp_path / "jsonl", Form.JSONL)
    export(read_records(records), tmp_path / "parquet", Form.PARQUET)
    part = records / "records" / "part-00000.parquet"
    given = [tmp_path / "jsonl" / "records.jsonl", tmp_path / "parquet", part]
    config = FinetuneConfig(epochs=1, batch_size=12)
    for number, path in enumerate(given):
        finetune_records(PHANTOM, path, tmp_path / f"adapter-{number}", config)
    weights = {(tmp_path / f"adapter-{n}" / "adapter_model.safetensors").read_bytes() for n in range(3)}
    assert len(weights) == 1


def test_records_without_their_images_are_refused(records: Path, tmp_path: Path) -> None:
    done = export(read_records(records), tmp_path / "jsonl", Form.JSONL)
    (tmp_path / "records.jsonl").write_text(done.path.read_text())
    with pytest.raises(NotFound, match="is missing"):
        finetune_records(PHANTOM, tmp_path / "records.jsonl", tmp_path / "adapter", FinetuneConfig())


def test_another_image_under_a_records_name_is_refused(records: Path, tmp_path: Path) -> None:
    done = export(read_records(records), tmp_path / "jsonl", Form.JSONL)
    first, second, *_ = sorted((done.path.parent / "images").iterdir())
    first.write_bytes(second.read_bytes())
    with pytest.raises(InvalidRecord, match="is not the image"):
        finetune_records(PHANTOM, done.path, tmp_path / "adapter", FinetuneConfig())


def test_a_file_that_is_no_text_is_refused_by_its_line(samples: Path) -> None:
    with pytest.raises(InvalidRecord, match="Line 1 is no preference record"):
        list(read_records(samples / "00.png"))


def test_nothing_that_is_there_is_replaced(tmp_path: Path) -> None:
    """Before anything is read: none of these records exists."""
    used, file, kept = tmp_path / "used", tmp_path / "file", tmp_path / "new.checkpoints" / "checkpoint-3"
    used.mkdir()
    (used / "adapter_config.json").touch()
    file.touch()
    kept.mkdir(parents=True)
    refusals = {
        used: "is no empty folder",
        file: "is no empty folder",
        tmp_path / "new": "is what an interrupted run left",
    }
    for out, reason in refusals.items():
        with pytest.raises(Conflict, match=reason):
            finetune_records(PHANTOM, tmp_path / "none", out, FinetuneConfig())
    with pytest.raises(Conflict, match="that run has ended"):
        finetune_records(PHANTOM, tmp_path / "none", used, FinetuneConfig(), resume=True)
    assert kept.is_dir()
    with pytest.raises(InvalidRecord, match="holds no preference records"):
        finetune_records(PHANTOM, tmp_path / "none", tmp_path / "new", FinetuneConfig(), resume=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = hscr("finetune", "--records", str(tmp_path), "--out", str(tmp_path / "file" / "adapter"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"{tmp_path / 'file' / 'adapter'}: Not a directory." in " ".join(done.stderr.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no CUDA device"):
        evaluate_adapter(PHANTOM, tmp_path, EvaluateConfig(), device="cuda")


@pytest.mark.parametrize(
    ("asked", "refusal", "why"),
    [
        ([], InvalidInput, "no questions"),
        ([("a", "Is it?"), ("a", "Is it so?")], InvalidInput, "the id a twice"),
        ([("a", "Is it?"), ("b", "<image> x")], InvalidQuestion, "Question b of the suite asked: .*control"),
        (
            [("a", "Is it?"), ("b", "word " * 2000)],
            InvalidQuestion,
            "Question b of the suite asked: .*tokens",
        ),
        (
            [("a", "Is it?"), ("b", "Is it so?", "No</s>")],
            InvalidRecord,
            "Question b of the suite asked: The answer .*control",
        ),
    ],
)
def test_a_suite_that_cannot_be_asked_is_refused_before_the_adapter_is_looked_at(
    asked: list[tuple[str, ...]], refusal: type[HscrError], why: str, samples: Path, tmp_path: Path
) -> None:
    (tmp_path / "i.png").write_bytes((samples / "00.png").read_bytes())
    suite, names = tmp_path / "asked.jsonl", ("id", "question", "answer")
    row = {"image": "i.png", "answer": "No", "answer_type": "CLOSED"}
    suite.write_text("".join(json.dumps(row | dict(zip(names, each, strict=False))) + "\n" for each in asked))
    with pytest.raises(refusal, match=why):
        evaluate_adapter(PHANTOM, tmp_path / "missing", EvaluateConfig(suite=str(suite)))
