"""VQA-RAD (Lau et al. 2018, doi:10.1038/sdata.2018.251): the public JSON (osf.io/89kps) or JSONL.

The public release marks test questions by a `phrase_type` that begins with `test`. Its training and test
questions share images, so an evaluation on its test split after training on the rest is not clean by image.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hscr.errors import InvalidInput
from hscr.rows.jsonl import NO_JSON, as_object, parse_object
from hscr.rows.row import Row, Unusable, Why, parse_row, text
from hscr.rows.source import RowSource

PUBLIC = "VQA_RAD Dataset Public.json"
FOLDERS = ("VQA_RAD Image Folder", "images")
_METADATA = ("answer_type", "question_type", "phrase_type", "image_organ")


def open_vqa_rad(path: Path, images: Path | None) -> RowSource:
    """`path`: the release's folder, its JSON file, a folder with `train.jsonl`, or a JSONL file.

    Of the release, questions of the public test split are unusable rows: what a model is judged on is not
    trained on. Raises InvalidInput.
    """
    file = _file(path)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return RowSource(digest, len(_entries(file)), lambda: _read(file, images or file.parent))


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in (PUBLIC, "train.jsonl"):
        if (path / name).is_file():
            return path / name
    raise InvalidInput(
        f"{path} holds neither {PUBLIC} nor train.jsonl.",
        remedy="Unpack the public release of VQA-RAD and name its folder.",
    )


def _entries(file: Path) -> list[dict[str, Any] | None]:
    """The whole release is 2 MB of JSON."""
    if file.suffix == ".jsonl":
        return [parse_object(line) for line in file.read_bytes().splitlines() if line.strip()]
    try:
        entries = json.loads(file.read_bytes())
    except NO_JSON as error:
        raise InvalidInput(f"{file} is no JSON.", remedy="Download the release again.") from error
    if not isinstance(entries, list):
        raise InvalidInput(f"{file} holds no list of questions.", remedy=f"Give the release's {PUBLIC}.")
    return [as_object(entry) for entry in entries]


def _read(file: Path, images: Path) -> Iterator[Row | Unusable]:
    for number, entry in enumerate(_entries(file), 1):
        yield _row(entry, f"row {number}", images)


def _row(entry: dict[str, Any] | None, place: str, images: Path) -> Row | Unusable:
    if entry is None:
        return Unusable(place, None, Why.MALFORMED, "The row is no JSON object in UTF-8.")
    identity = text(entry.get("id")) or f"rad-{text(entry.get('qid')) or place}"
    if text(entry.get("phrase_type")).startswith("test"):
        return Unusable(place, identity, Why.TEST_SPLIT, "The question belongs to the public test split.")
    values = {
        "id": identity,
        "image": entry.get("image") or _image(entry.get("image_name"), images),
        "question": entry.get("question"),
        "answer": entry.get("answer"),
        "study": _case(entry.get("image_case_url")),
        **{key: said for key in _METADATA if (said := text(entry.get(key)))},
    }
    return parse_row(values, place, images)


def _image(name: object, images: Path) -> str | None:
    """Relative to `images`, which holds the release's image folder or is that folder."""
    if not isinstance(name, str) or not name:
        return None
    inside = (folder for folder in FOLDERS if (images / folder).is_dir())
    return str(Path(next(inside, "")) / name)


def _case(url: object) -> str | None:
    """A MedPix case is one examination; its number groups the questions that are deleted together."""
    return f"medpix-{str(url).rpartition('=')[2].strip()}" if isinstance(url, str) and "=" in url else None
