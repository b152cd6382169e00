"""One input row, whatever file it came from, or why it cannot be used."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeGuard

_KNOWN = {"id", "image", "images", "file_name", "question", "answer", "study"}


class Why(StrEnum):
    """Why a row gave no preference record."""

    MALFORMED = "malformed"
    TEXT_ONLY = "text-only"
    SEVERAL_IMAGES = "several-images"
    EMPTY_QUESTION = "empty-question"
    EMPTY_ANSWER = "empty-answer"
    TEST_SPLIT = "test-split"
    MISSING_IMAGE = "missing-image"
    UNREADABLE_IMAGE = "unreadable-image"
    DUPLICATE_ID = "duplicate-id"
    NO_RECORD = "no-record"


@dataclass(frozen=True)
class Row:
    """A question about one image, with its right answer."""

    place: str
    """where it stands in the input: `line 3`, `row 3`, `folder/scan.png`"""
    image: Path | bytes
    question: str
    answer: str
    id: str | None = None
    study: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    """the row's further keys whose values are text, numbers or booleans"""


@dataclass(frozen=True)
class Unusable:
    place: str
    id: str | None
    why: Why
    reason: str
    """a sentence without patient data"""


def parse_row(values: Mapping[str, Any], place: str, images: Path) -> Row | Unusable:
    """Read the keys of one row.

    `image` (or `file_name`, or `images` with one element) is a path below `images`, the file's bytes, or
    `{"bytes", "path"}` as Hugging Face stores an image. Numbers are taken as their text, a NaN as a
    missing value. `id` and `study` are optional; further scalar keys become `metadata`.
    """
    identity = text(values.get("id")) or None
    found = _images(values)
    question, answer = text(values.get("question")), text(values.get("answer"))
    if len(found) > 1:
        return Unusable(place, identity, Why.SEVERAL_IMAGES, f"The row has {len(found)} images, not one.")
    if not found:
        return Unusable(place, identity, Why.TEXT_ONLY, "The row has no image: no path, no file's bytes.")
    if isinstance(found[0], str) and "\0" in found[0]:
        return Unusable(place, identity, Why.MISSING_IMAGE, "No path can hold a NUL character.")
    if not question:
        return Unusable(place, identity, Why.EMPTY_QUESTION, "The question is missing, empty or no text.")
    if not answer:
        return Unusable(place, identity, Why.EMPTY_ANSWER, "The answer is missing, empty or no text.")
    image = found[0] if isinstance(found[0], bytes) else images / found[0]
    study = text(values.get("study")) or None
    return Row(place, image, question, answer, identity, study, _metadata(values))


def _images(values: Mapping[str, Any]) -> list[str | bytes]:
    given = values.get("images")
    listed = given if isinstance(given, Sequence) and not isinstance(given, str | bytes) else [given]
    candidates = [values.get("image"), values.get("file_name"), *listed]
    return [image for image in map(_image, candidates) if image]


def _image(value: object) -> str | bytes | None:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, str | bytes) else None


def text(value: object) -> str:
    """A text, stripped, or a number as text; empty where the value is neither."""
    if isinstance(value, str):
        return value.strip()
    return str(value) if _is_number(value) else ""


def _is_number(value: object) -> TypeGuard[int | float]:
    # pandas writes NaN for a missing value, and JSON knows neither NaN nor infinity.
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in values.items()
        if key not in _KNOWN and (isinstance(value, str | bool) or _is_number(value))
    }
