"""A stored reference is used again only for the very same model, template, numbers and records (24)."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from hscr.learn.examples import Example, prepare
from hscr.learn.reference import read_reference, reference_file, write_reference
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord, Response
from tests.learn.records import CONFIG, files, record, records, run
from tests.tiny_llava import build, picture

SHORT = CONFIG.model_copy(update={"epochs": 1.0})


def name(vlm: VLM, pairs: list[tuple[PreferenceRecord, Image.Image]], adapter: str | None = None) -> str:
    return reference_file(Path(), vlm, prepare(vlm, pairs, CONFIG), adapter).name


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    logps = {"a": torch.tensor([-1 / 3, -1e-30, -7e4]), "b": torch.tensor([-0.1])}
    file = tmp_path / "new" / "reference-x.json"
    examples = [Example(record(0).but(id=key), [], [[0]] * len(row)) for key, row in logps.items()]
    write_reference(file, logps)
    found = read_reference(file, examples)
    assert all(
        torch.equal(found[key], value) and found[key].dtype == torch.float32 for key, value in logps.items()
    )
    assert list(file.parent.iterdir()) == [file]


def test_a_stored_reference_gives_the_same_bytes(vlm: VLM, tmp_path: Path) -> None:
    run(vlm, SHORT, tmp_path / "a", cache_dir=tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    written = stored.stat().st_mtime_ns
    run(vlm, SHORT, tmp_path / "b", cache_dir=tmp_path / "cache")
    run(vlm, SHORT, tmp_path / "c")
    assert stored.stat().st_mtime_ns == written
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


def test_a_stored_reference_is_what_training_uses(vlm: VLM, tmp_path: Path) -> None:
    examples = prepare(vlm, records(), SHORT)
    _, before = run(vlm, SHORT, tmp_path / "a", cache_dir=tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    write_reference(stored, {key: row - 1 for key, row in read_reference(stored, examples).items()})
    _, after = run(vlm, SHORT, tmp_path / "b", cache_dir=tmp_path / "cache")
    assert after[0]["logratio/chosen"] == pytest.approx(before[0]["logratio/chosen"] + 1, abs=1e-4)


@pytest.mark.parametrize("content", ["", "[]", '{"pref_0": "x"}', '{"pref_0": [0.5]}', "{}"])
def test_a_damaged_reference_is_computed_again(
    vlm: VLM, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(vlm, SHORT, tmp_path / "a", cache_dir=tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    whole = stored.read_bytes()
    stored.write_text(content)
    run(vlm, SHORT, tmp_path / "b", cache_dir=tmp_path / "cache")
    assert f"{stored} is damaged" in caplog.text
    assert stored.read_bytes() == whole
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_order_of_the_records_does_not_matter(vlm: VLM) -> None:
    assert name(vlm, records()) == name(vlm, records()[::-1])


@pytest.mark.parametrize(
    "change",
    [
        {"id": "pref_x"},
        {"image_digest": "another"},
        {"question": "is it so?"},
        {"chosen": "yes, right"},
        {"rejected": (Response(text="no", similarity=0.2, mean_probability=0.1),)},
    ],
)
def test_another_record_is_another_reference(vlm: VLM, change: dict[str, object]) -> None:
    other = [(record(0).model_copy(update=change), picture(0)), *records()[1:]]
    assert name(vlm, other) != name(vlm, records())
    assert name(vlm, records(7)) != name(vlm, records(8))


def test_an_adapter_under_the_reference_is_another_reference(vlm: VLM) -> None:
    assert name(vlm, records(), "0" * 64) != name(vlm, records())


def test_another_model_template_or_dtype_is_another_reference(vlm: VLM, folder: Path, tmp_path: Path) -> None:
    before = name(vlm, records())
    assert name(VLM.load(folder), records()) == before
    assert name(VLM(vlm.model, vlm.processor, "other weights", vlm.template_digest), records()) != before
    assert name(VLM(vlm.model, vlm.processor, vlm.digest, "other template"), records()) != before
    assert name(VLM.load(folder, dtype="bfloat16"), records()) != before
    assert name(VLM.load(build(tmp_path / "other", seed=1)), records()) != before
