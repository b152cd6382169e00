import json
from pathlib import Path

import pytest

from hscr.errors import Conflict, InvalidConfig, InvalidRecord, NotFound
from hscr.records import PreferenceRecord, Response, Substitution
from hscr.store.export import export, image_path, read_records

IMAGES = {"a" * 64: b"\x89PNG one", "b" * 64: b"\x89PNG two"}


def image(digest: str) -> bytes:
    if digest not in IMAGES:
        raise NotFound(f"No image {digest}.")
    return IMAGES[digest]


def record(number: int, digest: str, *rejected: str) -> PreferenceRecord:
    substitution = Substitution(position=1, old_id=5, new_id=7, sensitivity=0.25, contrast_probability=0.5)
    return PreferenceRecord(
        id=f"pref_{number}",
        image_digest=digest,
        study="study_1",
        question="Où est la lésion ?",
        chosen="right lung",
        rejected=tuple(
            Response(text=text, similarity=0.9 - 0.1 * n, mean_probability=0.2, substitutions=(substitution,))
            for n, text in enumerate(rejected)
        ),
        source=f"row_{number}",
        method="hscr",
        model_digest="c" * 64,
        config_digest="d" * 64,
        consent=True,
    )


RECORDS = [
    record(1, "a" * 64, "left lung", "left liver"),
    record(2, "b" * 64, "left lung"),
    record(3, "a" * 64, "the right kidney"),
]


def test_jsonl_reads_back_as_the_same_records_and_images(tmp_path: Path) -> None:
    done = export(RECORDS, image, tmp_path / "out", "jsonl")
    assert done == (tmp_path / "out" / "records.jsonl", 3, 3, 2)
    assert read_records(done.path) == RECORDS
    for digest, data in IMAGES.items():
        assert (tmp_path / "out" / image_path(digest)).read_bytes() == data


def test_trl_has_one_conversational_row_per_dispreferred_answer(tmp_path: Path) -> None:
    done = export(RECORDS, image, tmp_path / "out", "trl")
    rows = [json.loads(line) for line in done.path.read_text(encoding="utf-8").splitlines()]
    assert done.rows == len(rows) == 4
    assert rows[1] == {
        "images": [f"images/{'a' * 64}.png"],
        "prompt": [{"role": "user", "content": "Où est la lésion ?"}],
        "chosen": [{"role": "assistant", "content": "right lung"}],
        "rejected": [{"role": "assistant", "content": "left liver"}],
    }
    for row in rows:
        # TRL puts the one image placeholder in itself; a second one in the text would not match.
        assert "<image>" not in row["prompt"][0]["content"]
        assert row["chosen"] != row["rejected"]
        assert (tmp_path / "out" / row["images"][0]).is_file()
    assert "load_dataset" in (tmp_path / "out" / "README.md").read_text()


def test_nothing_is_written_when_an_image_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        export([*RECORDS, record(4, "e" * 64, "no")], image, tmp_path / "out", "trl")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(Conflict, match="not empty"):
        export(RECORDS, image, tmp_path, "jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_unknown_form_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="jsonl, trl"):
        export(RECORDS, image, tmp_path / "out", "parquet")


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    done = export(RECORDS, image, tmp_path / "out", "jsonl")
    lines = done.path.read_text().splitlines()
    done.path.write_text("\n".join([lines[0], lines[1].replace('"chosen"', '"chose"')]))
    with pytest.raises(InvalidRecord, match="Line 2"):
        read_records(done.path)
