"""What a version is asked: phantoms whose truth is known, or the rows of a JSONL file."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from hscr.config import EvaluateConfig
from hscr.errors import InvalidConfig, InvalidInput, InvalidRecord
from hscr.evaluate.llavamed import normalise
from hscr.imaging.decode import Prepared, prepare
from hscr.imaging.guard import Limits
from hscr.models.phantom.anatomy import Phantom, photograph
from hscr.models.phantom.data import BALANCED, Example, sample_examples
from hscr.models.phantom.language import KINDS

OPEN = "open"
CLOSED = "closed"


@dataclass(frozen=True)
class SuiteItem:
    """One question. `image_png` is prepared exactly as the gateway prepares an upload.

    Items of one `image_cluster` are not independent and are resampled together. `kind` and `truth_class` are
    the two levels that the macro score averages over. `phantom` is the truth behind a phantom's picture.
    """

    id: str
    image_png: bytes
    image_digest: str
    image_cluster: str
    kind: str
    truth_class: str
    question: str
    truth: str
    phantom: Phantom | None = None


@dataclass(frozen=True)
class Suite:
    name: str
    items: tuple[SuiteItem, ...]


def load_suite(config: EvaluateConfig) -> Suite:
    """The suite that a configuration names: `phantom`, or the path of a JSONL file (all its rows)."""
    if config.suite == "phantom":
        return phantom_suite(config.split, config.images, config.seed)
    return jsonl_suite(Path(config.suite))


def phantom_suite(split: Literal["development", "test"], images: int, seed: int) -> Suite:
    """Every kind of question about `images` balanced phantoms of the split; determined by its arguments."""
    examples = sample_examples(BALANCED, split, images, seed, len(KINDS))
    return Suite(f"phantom/{split}/{images}/{seed}", tuple(_phantom_items(examples)))


def _phantom_items(examples: Iterator[Example]) -> Iterator[SuiteItem]:
    picture = lru_cache(maxsize=2)(_photograph)  # the questions of one image follow one another
    for example in examples:
        prepared = picture(example.phantom)
        yield SuiteItem(
            id=example.id,
            image_png=prepared.png,
            image_digest=prepared.image.digest,
            image_cluster=f"{example.phantom.seed:x}",
            kind=example.kind,
            truth_class=example.truth_class,
            question=example.question,
            truth=example.answer,
            phantom=example.phantom,
        )


def _photograph(phantom: Phantom) -> Prepared:
    return prepare(photograph(phantom), limits=Limits())


def jsonl_suite(path: Path) -> Suite:
    """Rows `{id, image, question, answer, answer_type: OPEN | CLOSED}` as VQA-RAD's, images beside the file.

    Questions are clustered by `image_case_url` (the patient's case) where given, else by image. A closed
    row's truth class is its normalised answer; open rows form one class. Raises InvalidConfig for an
    unreadable file, InvalidRecord for a row and InvalidImage for an image, both with the line number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(
            f"The suite {path} cannot be read.", remedy="Give `phantom` or a JSONL file's path."
        ) from error
    return Suite(path.stem, tuple(_row_items(lines, path.parent.resolve())))


def _row_items(lines: Iterable[str], folder: Path) -> Iterator[SuiteItem]:
    read_image = lru_cache(maxsize=None)(lambda name: _image(folder, name))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row(line, number)
        try:
            prepared = read_image(row["image"])
        except InvalidInput as error:
            detail = f"Line {number} of the suite, image {row['image']}: {error.detail}"
            raise type(error)(detail, remedy=error.remedy) from error
        yield _row_item(row, prepared)


_COLUMNS = {"id": str | int, "image": str, "question": str, "answer": str | int | float, "answer_type": str}


def _row(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise _bad_row(number, "it is no JSON") from error
    if not isinstance(row, dict):
        raise _bad_row(number, "it is no object")
    missing = [column for column in _COLUMNS if not str(row.get(column, "")).strip()]
    if missing:
        raise _bad_row(number, f"{', '.join(missing)} missing")
    wrong = [column for column, kind in _COLUMNS.items() if not isinstance(row[column], kind)]
    if wrong:
        raise _bad_row(number, f"{', '.join(wrong)} of a wrong type")
    if row["answer_type"] not in {"OPEN", "CLOSED"}:
        raise _bad_row(number, "answer_type is neither OPEN nor CLOSED")
    return row


def _bad_row(number: int, why: str) -> InvalidRecord:
    return InvalidRecord(
        f"Line {number} of the suite cannot be used: {why}.",
        remedy=f"Each line is a JSON object with the texts {', '.join(_COLUMNS)}.",
    )


def _image(folder: Path, name: str) -> Prepared:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise InvalidRecord(
            "It is not a file beside the suite's.",
            remedy="Give image paths relative to the JSONL file, inside its folder.",
        )
    return prepare(path.read_bytes(), limits=Limits())


def _row_item(row: dict[str, Any], prepared: Prepared) -> SuiteItem:
    closed = row["answer_type"] == "CLOSED"
    answer = str(row["answer"])
    return SuiteItem(
        id=str(row["id"]),
        image_png=prepared.png,
        image_digest=prepared.image.digest,
        image_cluster=str(row.get("image_case_url") or row["image"]),
        kind=CLOSED if closed else OPEN,
        truth_class=normalise(answer.lower()) if closed else OPEN,
        question=str(row["question"]),
        truth=answer,
    )
