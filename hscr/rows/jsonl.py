"""Rows as lines of JSON."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hscr.rows.row import Row, Unusable, Why, parse_row
from hscr.rows.source import RowSource

NO_JSON = (ValueError, RecursionError)
"""what `json` raises: the second for brackets nested a thousand deep"""


def open_jsonl(path: Path, images: Path) -> RowSource:
    """Blank lines are no rows; a line that is no JSON object is an unusable one, named by its number."""
    digest, count = hashlib.sha256(), 0
    with path.open("rb") as file:
        for line in file:
            digest.update(line)
            count += bool(line.strip())
    return RowSource(digest.hexdigest(), count, lambda: _read(path, images))


def _read(path: Path, images: Path) -> Iterator[Row | Unusable]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield parse_line(line, f"line {number}", images)


def parse_line(line: bytes, place: str, images: Path) -> Row | Unusable:
    values = parse_object(line)
    if values is None:
        return Unusable(place, None, Why.MALFORMED, "The row is no JSON object in UTF-8.")
    return parse_row(values, place, images)


def parse_object(text: bytes) -> dict[str, Any] | None:
    """A JSON object in UTF-8, or None where the bytes are something else."""
    try:
        return as_object(json.loads(text))
    except NO_JSON:
        return None


def as_object(value: object) -> dict[str, Any] | None:
    """`value` where it is a JSON object and UTF-8 can hold it, else None."""
    if not isinstance(value, dict):
        return None
    try:
        # JSON's escapes can name half of a character, which no file, digest or tokenizer takes.
        json.dumps(value, ensure_ascii=False).encode()
    except NO_JSON:
        return None
    return value
