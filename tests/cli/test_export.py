"""Exports: what each form holds, what its reader would drop or misread, and reading ours back."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image as Pictures
from pydantic import ValidationError

from hscr.errors import Conflict, InvalidRecord, NotFound
from hscr.parquet import Image
from hscr.records import PreferenceRecord, Response, Substitution
from hscr.runs.canonical import Stored
from hscr.store.export.form import Form
from hscr.store.export.pairs import LlamaFactoryRow, RlaifvRow, SwiftRow, TrlRow
from hscr.store.export.read import image_path, read_records
from hscr.store.export.write import export
from tests.cli.running import hscr

OTHERS = [Form.TRL, Form.LLAMAFACTORY, Form.MS_SWIFT, Form.RLAIF_V]


def png(shade: int) -> bytes:
    made = io.BytesIO()
    Pictures.new("L", (8, 8), shade).save(made, "PNG")
    return made.getvalue()


def stored(number: int, shade: int, *rejected: str, **changes: Any) -> Stored:
    substitution = Substitution(position=1, old_id=5, new_id=7, sensitivity=0.25, contrast_probability=0.5)
    record = PreferenceRecord(
        id=f"pref_{number}",
        image_digest=hashlib.sha256(png(shade)).hexdigest(),
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
    return Stored(record.but(**changes), png(shade), {"answer_type": "OPEN"})


RECORDS = [
    stored(1, 10, "left lung", "left liver"),
    stored(2, 200, "left lung", adapter="local@0123456789ab"),
    stored(3, 10, " the right kidney "),
]
FIRST = image_path(RECORDS[0].record.image_digest)


def rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", [Form.JSONL, Form.PARQUET])
def test_our_own_forms_read_back_as_the_same_records_and_images(tmp_path: Path, form: Form) -> None:
    done = export(RECORDS, tmp_path / "out", form)
    assert done[1:] == (3, 3, 2)
    for path in (done.path, tmp_path / "out"):
        again = list(read_records(path))
        assert [each.png for each in again] == [each.png for each in RECORDS]
        for each, original in zip(again, RECORDS, strict=True):
            moment = original.record.created_at
            assert each.record.but(created_at=moment) == original.record


def test_trl_has_one_conversational_row_per_dispreferred_answer(tmp_path: Path) -> None:
    done = export(RECORDS, tmp_path / "out", Form.TRL)
    found = rows(done.path)
    assert done.rows == len(found) == 4
    assert found[1] == {
        "images": [{"bytes": png(10), "path": FIRST}],
        "prompt": [{"role": "user", "content": "Où est la lésion ?"}],
        "chosen": [{"role": "assistant", "content": "right lung"}],
        "rejected": [{"role": "assistant", "content": "left liver"}],
    }
    assert found[3]["rejected"][0]["content"] == "the right kidney"


def test_llamafactory_has_its_description_beside_it(tmp_path: Path) -> None:
    done = export(RECORDS, tmp_path / "out", Form.LLAMAFACTORY)
    assert rows(done.path)[0] == {
        "conversations": [{"from": "human", "value": "<image>Où est la lésion ?"}],
        "chosen": {"from": "gpt", "value": "right lung"},
        "rejected": {"from": "gpt", "value": "left lung"},
        "images": [FIRST],
    }
    (described,) = json.loads((tmp_path / "out" / "dataset_info.json").read_text()).values()
    assert (described["formatting"], described["ranking"]) == ("sharegpt", True)
    assert (tmp_path / "out" / described["file_name"]) == done.path
    assert set(described["columns"].values()) == set(rows(done.path)[0])
    assert (tmp_path / "out" / FIRST).read_bytes() == png(10)


def test_ms_swift_puts_the_preferred_answer_last(tmp_path: Path) -> None:
    done = export(RECORDS, tmp_path / "out", Form.MS_SWIFT)
    assert rows(done.path)[2] == {
        "messages": [
            {"role": "user", "content": "<image>Où est la lésion ?"},
            {"role": "assistant", "content": "right lung"},
        ],
        "rejected_response": "left lung",
        "images": [image_path(RECORDS[1].record.image_digest)],
    }


def test_rlaif_v_leaves_the_log_probs_to_its_own_first_pass(tmp_path: Path) -> None:
    done = export(RECORDS, tmp_path / "out", Form.RLAIF_V)
    assert "logp" not in done.path.name
    found = rows(done.path)
    assert [row["idx"] for row in found] == [0, 1, 2, 3]
    assert json.loads(found[2].pop("origin_split")) == {"record": "pref_2"}
    assert found[0]["image"] == {"bytes": png(10), "path": FIRST}
    assert set(found[2]) == {"image", "question", "chosen", "rejected", "idx", "origin_dataset", "image_path"}


@pytest.mark.parametrize("form", OTHERS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": "What is <image> of?"}, "<image>"),
        ({"chosen": "see <image>"}, "<image>"),
        ({"question": "In the <video>?"}, "<video>"),
        ({"chosen": "left lung"}, "the same text"),
        ({"chosen": "  "}, "chosen"),
    ],
)
def test_what_a_reader_would_misread_is_refused_by_id(
    tmp_path: Path, form: Form, changes: dict[str, str], words: str
) -> None:
    with pytest.raises(InvalidRecord, match="pref_9 cannot be exported") as refused:
        export([*RECORDS, stored(9, 10, "left lung", **changes)], tmp_path / "out", form)
    assert words in refused.value.detail
    assert list(tmp_path.iterdir()) == []


TURN = {"from": "human", "value": "<image>Q"}
GOOD = {
    LlamaFactoryRow: {
        "conversations": [TURN], "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "B"}, "images": ["a.png"],
    },
    SwiftRow: {
        "messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}],
        "rejected_response": "B", "images": ["a.png"],
    },
    TrlRow: {
        "images": [Image(bytes=b"png", path="a.png")], "prompt": [{"role": "user", "content": "Q"}],
        "chosen": [{"role": "assistant", "content": "A"}],
        "rejected": [{"role": "assistant", "content": "B"}],
    },
    RlaifvRow: {
        "image": Image(bytes=b"png", path="a.png"), "question": "Q", "chosen": "A", "rejected": "B", "idx": 0,
        "origin_dataset": "hscr", "origin_split": "{}", "image_path": "a.png",
    },
}  # fmt: skip
BROKEN = [
    (LlamaFactoryRow, "conversations", [TURN, {"from": "gpt", "value": "A"}], "odd number"),
    (LlamaFactoryRow, "conversations", [TURN, TURN, TURN], "alternate"),
    (LlamaFactoryRow, "conversations", [{"from": "human", "value": "Q"}], "0 times <image>"),
    (LlamaFactoryRow, "chosen", {"from": "human", "value": "A"}, "by `gpt`"),
    (LlamaFactoryRow, "rejected", {"from": "gpt", "value": "A"}, "the same text"),
    (LlamaFactoryRow, "images", ["a.png", "b.png"], "1 times <image>"),
    (SwiftRow, "rejected_response", ["B"], "valid string"),
    (SwiftRow, "rejected_response", "A", "the same text"),
    (SwiftRow, "messages", [{"role": "user", "content": "<image>Q"}] * 2, "last message"),
    (SwiftRow, "messages", [{"role": "human", "content": "<image>Q"}] * 2, "user"),
    (TrlRow, "prompt", [{"role": "user", "content": "<image>Q"}], "1 times <image>"),
    (TrlRow, "prompt", [{"role": "assistant", "content": "Q"}], "user's turn"),
    (TrlRow, "chosen", [{"role": "user", "content": "A"}], "assistant's"),
    (RlaifvRow, "origin_split", "train", "Expecting value"),
    (RlaifvRow, "logps", "[]", "Extra inputs"),
]


@pytest.mark.parametrize("model", GOOD)
def test_a_row_as_documented_passes_its_check(model: type[Any]) -> None:
    model.model_validate(GOOD[model])


@pytest.mark.parametrize(("model", "key", "value", "words"), BROKEN)
def test_each_documented_rule_is_checked(model: type[Any], key: str, value: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        model.model_validate({**GOOD[model], key: value})


@pytest.mark.parametrize("form", list(Form))
def test_every_export_carries_a_card(tmp_path: Path, form: Form) -> None:
    done = export(RECORDS, tmp_path / "out", form)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"data_files: {done.path.relative_to(tmp_path / 'out')}" in card
    for said in ("hscr", "c" * 64, "d" * 64, "local@0123456789ab", "| 3 |", "research use only", "consent"):
        assert said in card
    assert str(tmp_path) not in card


def test_nothing_is_written_when_an_image_is_missing(tmp_path: Path) -> None:
    done = export(RECORDS, tmp_path / "first", Form.JSONL)
    (done.path.parent / FIRST).unlink()
    with pytest.raises(NotFound, match="is missing"):
        export(read_records(done.path), tmp_path / "out", Form.TRL)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(Conflict, match="not empty"):
        export(RECORDS, tmp_path, Form.JSONL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_beside_the_folder_is_touched(tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "notes.txt").write_text("precious")
    export(RECORDS, tmp_path / "out", Form.TRL)
    assert (tmp_path / "out.part" / "notes.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.part"]
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "out.part").stat().st_mode


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    done = export(RECORDS, tmp_path / "out", Form.JSONL)
    lines = done.path.read_text().splitlines()
    done.path.write_text("\n".join([lines[0], lines[1].replace('"chosen"', '"chose"')]))
    with pytest.raises(InvalidRecord, match="Line 2"):
        list(read_records(done.path))
    with pytest.raises(InvalidRecord, match="holds no preference records"):
        list(read_records(tmp_path))


def test_the_command_names_the_known_forms(tmp_path: Path) -> None:
    export(RECORDS, tmp_path / "records", Form.JSONL)
    files = ["--records", str(tmp_path / "records"), "--out", str(tmp_path / "out")]
    refused = hscr("export", *files, "--format", "csv")
    assert refused.returncode == 2
    assert "rlaif-v" in refused.stderr
    done = hscr("export", *files, "--format", "ms-swift", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["records"], said["rows"], said["images"]) == (3, 4, 2)
