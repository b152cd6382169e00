"""What is asked: determined by its arguments, prepared as the gateway prepares, honest about bad rows."""

import hashlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from hscr.config import EvaluateConfig
from hscr.errors import InvalidConfig, InvalidImage, InvalidRecord
from hscr.evaluate.suites import Suite, jsonl_suite, load_suite, phantom_suite
from hscr.imaging.decode import prepare
from hscr.imaging.guard import Limits
from hscr.models.phantom.language import KINDS


def test_a_phantom_suite_is_determined_by_its_arguments(phantoms: Suite) -> None:
    assert phantoms == phantom_suite("development", 30, seed=3)
    others = phantom_suite("development", 30, seed=4), phantom_suite("test", 30, seed=3)
    clusters = {item.image_cluster for item in phantoms.items}
    assert all(clusters.isdisjoint(item.image_cluster for item in other.items) for other in others)


def test_a_phantom_suite_asks_every_kind_about_every_image_that_allows_it(phantoms: Suite) -> None:
    assert len({item.id for item in phantoms.items}) == len(phantoms.items)
    assert len({item.image_cluster for item in phantoms.items}) == 30
    for item in phantoms.items:
        assert item.phantom is not None
        assert f"{item.phantom.seed:x}" == item.image_cluster
    with_finding = {item.image_cluster for item in phantoms.items if item.kind == "side"}
    assert {item.kind for item in phantoms.items} == set(KINDS)
    assert len(phantoms.items) == len(with_finding) * len(KINDS) + (30 - len(with_finding)) * (len(KINDS) - 3)


def test_suite_images_are_what_the_gateway_would_send(phantoms: Suite) -> None:
    item = phantoms.items[0]
    assert item.image_digest == hashlib.sha256(item.image_png).hexdigest()
    assert prepare(item.image_png, limits=Limits()).png == item.image_png


ROW = {"id": "a", "image": "i.png", "question": "Is it?", "answer": "No", "answer_type": "CLOSED"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    buffer = io.BytesIO()
    Image.new("L", (20, 10), 90).save(buffer, format="PNG")
    (tmp_path / "i.png").write_bytes(buffer.getvalue())
    (tmp_path / "broken.png").write_bytes(buffer.getvalue()[:-20])
    return tmp_path


def write(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_rows_become_items(folder: Path) -> None:
    open_row = {**ROW, "id": "b", "answer": "The left lung", "answer_type": "OPEN", "image_case_url": "case"}
    closed, opened = jsonl_suite(write(folder, ROW, "", open_row)).items
    assert (closed.kind, closed.truth_class, closed.image_cluster) == ("closed", "no", "i.png")
    assert (opened.kind, opened.truth_class, opened.image_cluster) == ("open", "open", "case")
    assert (opened.truth, closed.image_png) == ("The left lung", opened.image_png)
    (numbers,) = jsonl_suite(write(folder, {**ROW, "id": 7, "answer": 2.5})).items
    assert (numbers.id, numbers.truth) == ("7", "2.5")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("{", "line 2.*JSON"),
        ([1], "line 2.*object"),
        ({**ROW, "answer": " "}, "line 2.*answer missing"),
        ({key: value for key, value in ROW.items() if key != "image"}, "line 2.*image missing"),
        ({**ROW, "answer_type": "MAYBE"}, "line 2.*OPEN"),
        ({**ROW, "image": 5}, "line 2.*image of a wrong type"),
        ({**ROW, "answer": None, "answer_type": ["OPEN"]}, "line 2.*answer, answer_type of a wrong type"),
        ({**ROW, "image": "../outside.png"}, r"line 2.*outside\.png.*not a file beside"),
        ({**ROW, "image": "gone.png"}, r"line 2.*gone\.png.*not a file beside"),
    ],
)
def test_bad_rows_are_named(folder: Path, bad: object, why: str) -> None:
    with pytest.raises(InvalidRecord, match=f"(?i){why}"):
        jsonl_suite(write(folder, ROW, bad))


def test_a_broken_image_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidImage, match=r"Line 2 of the suite, image broken\.png: .*damaged"):
        jsonl_suite(write(folder, ROW, {**ROW, "image": "broken.png"}))


def test_the_configuration_names_the_suite(folder: Path) -> None:
    assert load_suite(EvaluateConfig(images=2, seed=1)) == phantom_suite("development", 2, 1)
    assert load_suite(EvaluateConfig(suite=str(write(folder, ROW)))).name == "rows"
    with pytest.raises(InvalidConfig, match="JSONL"):
        load_suite(EvaluateConfig(suite=str(folder / "missing.jsonl")))


@pytest.mark.data
def test_real_questions(vqa_rad: Path) -> None:
    suite = jsonl_suite(vqa_rad / "eval.jsonl")
    assert len(suite.items) == 190
    assert len({item.image_digest for item in suite.items}) == 30
    assert {item.kind for item in suite.items} == {"open", "closed"}
