"""Preference records with their images, from whatever this project has written them to."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from hscr.errors import InvalidRecord, NotFound
from hscr.records import PreferenceRecord
from hscr.runs.canonical import Stored, read_part

JSONL, PARTS = "records.jsonl", "records"


def read_records(path: Path) -> Iterator[Stored]:
    """Records of a Parquet file, of a JSONL file with `images/` beside it, or of a folder of either.

    Raises InvalidRecord that names the file, line or record; NotFound for a missing image.
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
    return sorted((path / PARTS).glob("*.parquet")) or sorted(path.glob("*.parquet"))


def _read_jsonl(path: Path) -> Iterator[Stored]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                record = _parse(line, number)
                yield Stored(record, _image(path.parent / image_path(record.image_digest)), {})


def _parse(line: str, number: int) -> PreferenceRecord:
    try:
        return PreferenceRecord.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "row"
        raise InvalidRecord(
            f"Line {number} is no preference record: {place}: {first['msg']}.",
            remedy="Export the records again.",
        ) from error


def _image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFound(
            f"The image {path} is missing.", remedy="Keep `images/` beside the records file."
        ) from error
