"""Every layout of rows: what is read, in which order, and how an unusable row is told."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hscr.errors import InvalidInput
from hscr.rows.row import Row, Unusable, Why
from hscr.rows.source import RowSource, open_rows

GOOD = {"image": "a.png", "question": "Is it there?", "answer": "Yes."}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(source: RowSource) -> list[Row | Unusable]:
    first, second = list(source.read()), list(source.read())
    assert first == second
    assert len(first) == source.count
    return first


def why(rows: list[Row | Unusable]) -> list[Why | None]:
    return [row.why if isinstance(row, Unusable) else None for row in rows]


def test_jsonl_names_each_unusable_line_and_goes_on(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "rows.jsonl",
        {**GOOD, "id": 7, "study": "s", "answer_type": "CLOSED", "boxes": [1]},
        '{"image": "a.png", "question": ',
        "",
        '["no", "object"]',
        {**GOOD, "image": None},
        {"question": "What?", "answer": "Text only.", "id": "t"},
        {**GOOD, "answer": " "},
        {**GOOD, "question": ""},
        {**GOOD, "images": ["b.png"]},
        {**GOOD, "answer": True},
        {**GOOD, "answer": 3},
    )
    rows = read(open_rows(str(path), tmp_path / "pictures"))
    assert rows[0] == Row(
        "line 1", tmp_path / "pictures" / "a.png", "Is it there?", "Yes.", "7", "s", {"answer_type": "CLOSED"}
    )
    assert why(rows[1:-1]) == [
        Why.MALFORMED, Why.MALFORMED, Why.TEXT_ONLY, Why.TEXT_ONLY, Why.EMPTY_ANSWER, Why.EMPTY_QUESTION,
        Why.SEVERAL_IMAGES, Why.EMPTY_ANSWER,
    ]  # fmt: skip
    assert isinstance(rows[1], Unusable)
    assert (rows[1].place, rows[1].reason) == ("line 2", "The row is no JSON object in UTF-8.")
    assert rows[4] == Unusable(
        "line 6", "t", Why.TEXT_ONLY, "The row has no image: no path, no file's bytes."
    )
    assert isinstance(rows[-1], Row)
    assert rows[-1].answer == "3"


def test_bytes_that_are_no_utf_8_are_one_malformed_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"image": "\xff"}\n' + json.dumps(GOOD).encode())
    assert why(read(open_rows(str(path)))) == [Why.MALFORMED, None]


HALF = "\\ud83d"
UNWRITABLE = {
    "question": json.dumps(GOOD).replace("Is it", HALF),
    "answer": json.dumps(GOOD).replace("Yes", HALF),
    "image": json.dumps(GOOD).replace("a.png", HALF),
    "id": json.dumps({**GOOD, "id": "@"}).replace("@", HALF),
    "metadata": json.dumps({**GOOD, "boxes": ["@"]}).replace("@", HALF),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("row", UNWRITABLE.values(), ids=UNWRITABLE)
@pytest.mark.parametrize("layout", ["jsonl", "sidecars", "vqa-rad"])
def test_what_no_record_could_hold_is_one_malformed_row(tmp_path: Path, row: str, layout: str) -> None:
    if layout == "sidecars":
        for name, text in (("a", row), ("b", json.dumps(GOOD))):
            (tmp_path / f"{name}.png").write_bytes(b"")
            (tmp_path / f"{name}.json").write_text(text)
        given = str(tmp_path)
    else:
        path = lines(tmp_path / "rows.jsonl", row, GOOD)
        given = f"vqa-rad:{path}" if layout == "vqa-rad" else str(path)
    assert why(read(open_rows(given))) == [Why.MALFORMED, None]


def test_one_bad_object_of_a_list_costs_only_itself(tmp_path: Path) -> None:
    listed = "[" + ",".join([json.dumps(GOOD), UNWRITABLE["answer"], "7", json.dumps(GOOD)]) + "]"
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.json").write_text(listed)
    for given in (str(tmp_path), f"vqa-rad:{tmp_path / 'a.json'}"):
        assert why(read(open_rows(given))) == [None, Why.MALFORMED, Why.MALFORMED, None]
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(InvalidInput, match="is no JSON"):
        open_rows(f"vqa-rad:{tmp_path / 'a.json'}")


@pytest.mark.parametrize(
    ("image", "expected"),
    [("a\0.png", Why.MISSING_IMAGE), (5, Why.TEXT_ONLY), (float("nan"), Why.TEXT_ONLY)],
)
def test_an_image_that_is_no_path_is_told_as_such(tmp_path: Path, image: object, expected: Why) -> None:
    (row,) = read(open_rows(str(lines(tmp_path / "rows.jsonl", {**GOOD, "image": image}))))
    assert isinstance(row, Unusable)
    assert row.why is expected
    assert "path" in row.reason


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_missing(tmp_path: Path, number: float) -> None:
    unanswered, row = {**GOOD, "answer": number}, {**GOOD, "id": number, "study": number, "note": number}
    first, second = read(open_rows(str(lines(tmp_path / "rows.jsonl", unanswered, row))))
    assert why([first]) == [Why.EMPTY_ANSWER]
    assert second == Row("line 2", tmp_path / "a.png", "Is it there?", "Yes.")
    pq.write_table(pa.table({k: [v] for k, v in row.items()}), tmp_path / "rows.parquet")
    assert read(open_rows(str(tmp_path / "rows.parquet"))) == [
        Row("row 1", tmp_path / "a.png", "Is it there?", "Yes.")
    ]


def test_the_digest_follows_the_rows(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", GOOD)
    before = open_rows(str(path)).digest
    assert open_rows(str(path)).digest == before
    lines(path, {**GOOD, "answer": "No."})
    assert open_rows(str(path)).digest != before


IMAGES = {
    "hugging face": ([{"bytes": b"one", "path": None}, {"bytes": None, "path": "b.png"}], "image"),
    "binary": ([b"one", b"two"], "image"),
    "paths": (["a.png", "b.png"], "file_name"),
    "list": ([[{"bytes": b"one", "path": "a.png"}], [{"bytes": b"two", "path": "b.png"}]], "images"),
}


@pytest.mark.parametrize(("images", "column"), IMAGES.values(), ids=IMAGES)
def test_parquet_takes_images_in_every_usual_form(tmp_path: Path, images: list[Any], column: str) -> None:
    table = pa.table({column: images, "question": ["Q?", "R?"], "answer": ["A", None], "n": [1, 2]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=1)
    first, second = read(open_rows(str(tmp_path / "rows.parquet")))
    assert isinstance(first, Row)
    assert first.image in {b"one", tmp_path / "a.png"}
    assert (first.place, first.question, first.answer, first.metadata) == ("row 1", "Q?", "A", {"n": 1})
    assert why([second]) == [Why.EMPTY_ANSWER]


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    rows = 4096
    table = pa.table({"image": [os.urandom(4096)] * rows, "question": ["Q?"] * rows, "answer": ["A"] * rows})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=64, use_dictionary=False)
    source = open_rows(str(tmp_path / "rows.parquet"))
    before = pa.total_allocated_bytes()
    read_rows = source.read()
    first = next(read_rows)
    assert isinstance(first, Row)
    assert pa.total_allocated_bytes() - before < table.nbytes / 4
    assert source.count == rows


def test_a_parquet_file_without_an_answer_column_is_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png"], "question": ["Q?"]}), tmp_path / "rows.parquet")
    with pytest.raises(InvalidInput, match=r"no column answer; it has image, question"):
        open_rows(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InvalidInput, match="is no Parquet file"):
        open_rows(str(tmp_path / "rows.parquet"))


def test_columns_that_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    table = pa.table(
        {
            **{key: pa.array([value]).dictionary_encode() for key, value in GOOD.items()},
            "date": pa.array([10**8], pa.date32()),
            "zone": pa.array([1], pa.timestamp("us", tz="Nowhere/None")),
            "n": [1],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    (row,) = read(open_rows(str(tmp_path / "rows.parquet")))
    assert row == Row("row 1", tmp_path / "a.png", "Is it there?", "Yes.", metadata={"n": 1})


@pytest.mark.parametrize("damage", ["page", "text"])
def test_parquet_that_cannot_be_read_through_is_named_with_the_row(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({key: [f"{value} {n}" for n in range(32)] for key, value in GOOD.items()})
    pq.write_table(table, path, row_group_size=16, use_dictionary=False, compression="none")
    data = bytearray(path.read_bytes())
    page = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    first = page if damage == "page" else data.index(b"Is it there? 20")
    data[first : first + 4] = b"\xff" * 4
    path.write_bytes(data)
    source = open_rows(str(path)).read()
    for _ in range(16):
        next(source)
    with pytest.raises(InvalidInput, match=r"rows\.parquet cannot be read from row 17 on"):
        next(source)


def test_a_folder_is_an_imagefolder_parquet_shards_or_sidecars(tmp_path: Path) -> None:
    imagefolder = tmp_path / "imagefolder"
    imagefolder.mkdir()
    lines(imagefolder / "metadata.jsonl", {**GOOD, "image": None, "file_name": "train/a.png"})
    (row,) = read(open_rows(str(imagefolder)))
    assert isinstance(row, Row)
    assert row.image == imagefolder / "train" / "a.png"

    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("b", "a"):
        pq.write_table(
            pa.table({k: [v] for k, v in {**GOOD, "answer": name}.items()}), shards / f"{name}.parquet"
        )
    assert [row.answer for row in read(open_rows(str(shards))) if isinstance(row, Row)] == ["a", "b"]

    sidecars = tmp_path / "sidecars"
    (sidecars / "case").mkdir(parents=True)
    for name in ("case/2.jpg", "1.png", "3.png", "4.png"):
        (sidecars / name).write_bytes(b"")
    said = {"question": "Q?", "answer": "A"}
    (sidecars / "1.json").write_text(json.dumps(said))
    (sidecars / "case" / "2.json").write_text(json.dumps([said, {**said, "answer": "B"}]))
    (sidecars / "3.json").write_text("{")
    (sidecars / "5.json").write_text(json.dumps(said))
    rows = read(open_rows(str(sidecars)))
    assert [row.place for row in rows] == ["1.png", "3.png", "4.png", "5.png", "case/2.jpg", "case/2.jpg"]
    assert why(rows) == [None, Why.MALFORMED, Why.EMPTY_QUESTION, None, None, None]
    assert isinstance(rows[4], Row)
    assert rows[4].image == sidecars / "case" / "2.jpg"


def test_a_folder_that_holds_no_rows_or_two_lists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InvalidInput, match="holds no rows"):
        open_rows(str(tmp_path))
    lines(tmp_path / "rows.jsonl", GOOD)
    lines(tmp_path / "metadata.jsonl", GOOD)
    with pytest.raises(InvalidInput, match=r"rows\.jsonl and metadata\.jsonl"):
        open_rows(str(tmp_path))
    with pytest.raises(InvalidInput, match="does not exist"):
        open_rows(str(tmp_path / "none"))


def test_what_appears_in_a_folder_after_it_was_opened_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.png").write_bytes(b"")
    (tmp_path / "z" / "a.json").write_text(json.dumps(GOOD))
    source = open_rows(str(tmp_path))
    (tmp_path / "out" / "records").mkdir(parents=True)
    (tmp_path / "out" / "run.json").write_text("{}")
    assert [row.place for row in read(source)] == ["z/a.png"]
    again = open_rows(str(tmp_path))
    assert (again.digest, read(again)) == (source.digest, read(source))


def test_a_sidecar_beside_another_kind_of_file_stands_for_that_file(tmp_path: Path) -> None:
    for name in ("a.png", "scan.bmp"):
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).with_suffix(".json").write_text(json.dumps(GOOD))
    assert [row.place for row in read(open_rows(str(tmp_path)))] == ["a.png", "scan.bmp"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(InvalidInput, match=r"no image \(\.png, \.jpg, \.jpeg, \.dcm\) with its JSON"):
        open_rows(str(tmp_path))


def test_a_name_that_is_no_utf_8_is_read_and_told_escaped(tmp_path: Path) -> None:
    named, bare = tmp_path / os.fsdecode(b"\xff.png"), tmp_path / os.fsdecode(b"\xfe.png")
    named.write_bytes(b"")
    bare.write_bytes(b"")
    named.with_suffix(".json").write_text(json.dumps(GOOD))
    first, second = read(open_rows(str(tmp_path)))
    assert isinstance(first, Unusable)
    assert (first.place, first.reason) == ("\\xfe.png", "\\xfe.png has no \\xfe.json beside it.")
    assert isinstance(second, Row)
    assert (second.place, second.image) == ("\\xff.png", named)


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "a.png", "rows"])
def test_another_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match=r"neither a folder nor a \.jsonl or \.parquet file"):
        open_rows(str(lines(tmp_path / name, GOOD)))


@pytest.mark.parametrize("layout", ["jsonl", "parquet", "folder", "vqa-rad"])
def test_a_source_of_no_rows_is_refused(tmp_path: Path, layout: str) -> None:
    lines(tmp_path / "rows.jsonl", "")
    (tmp_path / "rows.json").write_text("[]")
    pq.write_table(pa.table({k: [v] for k, v in GOOD.items()}).slice(1), tmp_path / "rows.parquet")
    given = {"folder": str(tmp_path), "vqa-rad": f"vqa-rad:{tmp_path / 'rows.json'}"}
    with pytest.raises(InvalidInput, match="holds no rows"):
        open_rows(given.get(layout, str(tmp_path / f"rows.{layout}")))


PUBLIC = [
    {
        "qid": 1, "phrase_type": "freeform", "image_name": "synpic1.jpg", "question": "Is it?",
        "answer": "Yes", "answer_type": "CLOSED ", "question_type": "PRES", "image_organ": "HEAD",
        "image_case_url": "https://medpix.nlm.nih.gov/case?id=case-1", "evaluation": "evaluated",
    },
    {
        "qid": "2", "phrase_type": "para", "image_name": "synpic1.jpg", "question": "How many?", "answer": 5,
        "answer_type": "OPEN", "image_case_url": "",
    },
    {
        "qid": 3, "phrase_type": "test_freeform", "image_name": "synpic2.jpg", "question": "Is it?",
        "answer": "No",
    },
]  # fmt: skip


@pytest.mark.parametrize("given", ["folder", "file"])
def test_the_public_release_of_vqa_rad_is_read_without_its_test_split(tmp_path: Path, given: str) -> None:
    (tmp_path / "VQA_RAD Image Folder").mkdir()
    file = tmp_path / "VQA_RAD Dataset Public.json"
    file.write_text(json.dumps(PUBLIC))
    first, second, third = read(open_rows(f"vqa-rad:{tmp_path if given == 'folder' else file}"))
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert first.image == tmp_path / "VQA_RAD Image Folder" / "synpic1.jpg"
    assert (first.id, first.study, first.metadata["answer_type"]) == ("rad-1", "medpix-case-1", "CLOSED")
    assert (second.id, second.study, second.answer) == ("rad-2", None, "5")
    assert isinstance(third, Unusable)
    assert (third.id, third.why) == ("rad-3", Why.TEST_SPLIT)
    with pytest.raises(InvalidInput, match="neither VQA_RAD Dataset"):
        open_rows(f"vqa-rad:{tmp_path / 'VQA_RAD Image Folder'}")


def test_values_of_vqa_rad_may_have_any_type(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "rows.jsonl",
        {**GOOD, "id": 5, "phrase_type": "test_freeform"},
        {**GOOD, "id": 0, "image_organ": None, "phrase_type": float("nan"), "answer_type": "OPEN "},
        {**GOOD, "image": None, "image_name": 5, "qid": 1},
        {**GOOD, "qid": None},
    )
    test, *rows = read(open_rows(f"vqa-rad:{path}"))
    assert (test.id, why([test, *rows])) == ("5", [Why.TEST_SPLIT, None, Why.TEXT_ONLY, None])
    assert [row.id for row in rows] == ["0", "rad-1", "rad-row 4"]
    assert isinstance(rows[0], Row)
    assert rows[0].metadata == {"answer_type": "OPEN"}


@pytest.mark.data
def test_vqa_rad_as_found_here_is_whole() -> None:
    root = Path(os.environ.get("HSCR_DATA", Path(__file__).parents[3] / "shared" / "data")) / "vqa_rad"
    if not root.is_dir():
        pytest.skip(f"no VQA-RAD in {root}; point HSCR_DATA at a folder that holds vqa_rad/")
    rows = read(open_rows(f"vqa-rad:{root}"))
    usable = [row for row in rows if isinstance(row, Row)]
    assert len(usable) == len(rows) == 1792
    assert all(isinstance(row.image, Path) and row.image.is_file() for row in usable)
    assert {row.metadata["answer_type"] for row in usable} == {"OPEN", "CLOSED"}
    assert all(row.study and row.study.startswith("medpix-") for row in usable)
