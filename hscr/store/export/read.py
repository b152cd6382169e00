"""Preference records with their images, from whatever this project has written them to."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from hscr.errors import Conflict, InvalidRecord, NotFound
from hscr.records import PreferenceRecord
from hscr.runs.canonical import Stored, read_part
from hscr.runs.folder import RECORDS, RUN, read_about

JSONL = "records.jsonl"


def read_records(path: Path) -> Iterator[Stored]:
    """Records of a Parquet file, of a JSONL file with `images/` beside it, or of a folder of either.

    Raises InvalidRecord that names the file, line or record; NotFound for a missing image; Conflict for the
    folder of a run that has not finished.
    """
    files = _files(path)
    if not files:
        raise InvalidRecord(
            f"{path} holds no preference records.",
            remedy="Give what `hscr generate --out` or `hscr export --format jsonl` or `parquet` wrote.",
        )
    for file in files:
        yield from read_part(file) if file.suffix == ".parquet" else _read_jsonl(file)


def image_path(digest: str) -> str:
    """Of an image, relative to the JSONL file."""
    return f"images/{digest}.png"


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / JSONL).is_file():
        return [path / JSONL]
    parts = path / RECORDS if (path / RECORDS).is_dir() else path.resolve()  # `.` has no name
    if parts.name == RECORDS:
        _check_finished(parts.parent)
    return sorted(parts.glob("*.parquet")) or sorted(path.glob("*.parquet"))


def _check_finished(folder: Path) -> None:
    if (folder / RUN).is_file() and read_about(folder)["finished_at"] is None:
        raise Conflict(
            f"The run in {folder} has not finished.",
            remedy=f"Go on with `hscr generate --resume`, or name a single file of its {RECORDS}/*.parquet.",
        )


def _read_jsonl(path: Path) -> Iterator[Stored]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                record = _parse(line, number)
                yield Stored(record, _image(path.parent, record), {})


def _parse(line: bytes, number: int) -> PreferenceRecord:
    try:
        return PreferenceRecord.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "row"
        raise InvalidRecord(
            f"Line {number} is no preference record: {place}: {first['msg']}.",
            remedy="Export the records again.",
        ) from error


def _image(folder: Path, record: PreferenceRecord) -> bytes:
    path = folder / image_path(record.image_digest)
    try:
        png = path.read_bytes()
    except OSError as error:
        raise NotFound(
            f"The image {path} is missing.", remedy="Keep `images/` beside the records file."
        ) from error
    if hashlib.sha256(png).hexdigest() != record.image_digest:
        raise InvalidRecord(
            f"{record.id}: {path} is not the image that the record is about.",
            remedy="Export the records again.",
        )
    return png
