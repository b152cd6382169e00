"""From rows to records, keeping the reason of every row that gives none."""

import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image
from pydantic import BaseModel, ConfigDict

from hscr.errors import InvalidImage
from hscr.imaging.decode import Prepared, prepare
from hscr.imaging.guard import Limits
from hscr.records import PreferenceRecord, PreferenceSource
from hscr.rows.row import Row, Unusable, Why
from hscr.runs.canonical import Stored

_IMAGES_KEPT = 16


class Skip(BaseModel):
    """An input row without a record."""

    model_config = ConfigDict(frozen=True)

    row: int
    """0-based place in the input"""
    place: str
    id: str | None
    why: Why
    reason: str


class Unmade(Protocol):
    """What the generator says of a source that gave no record (`contrast.generate.Skipped`)."""

    @property
    def source_id(self) -> str: ...
    @property
    def reason(self) -> str: ...


Numbered = tuple[int, Row | Unusable]
Generate = Callable[[Iterable[tuple[PreferenceSource, Image.Image]]], Iterator[PreferenceRecord | Unmade]]


@dataclass
class Told:
    """What one pass over rows leaves behind besides its records."""

    ids: set[str]
    """of all sources so far: a second row of the same id is skipped"""
    skips: list[Skip]


class _Pending(NamedTuple):
    number: int
    source: PreferenceSource
    png: bytes
    row: Row


def produce(
    rows: Iterable[Numbered],
    generate: Generate,
    told: Told,
    on_row: Callable[[int], None] = lambda _number: None,
) -> Iterator[Stored]:
    """A record for every row that can have one, in the rows' order; the others end in `told.skips`.

    `generate` gives one outcome per source, in order. Images are decoded when it asks for them, so no more
    are in memory than it holds. `on_row(number)` follows each row whose fate is known.
    """
    pending: deque[_Pending] = deque()
    for outcome in generate(_sources(rows, told, pending)):
        number, source, png, row = pending.popleft()
        if isinstance(outcome, PreferenceRecord):
            yield Stored(outcome, png, row.metadata)
        else:
            told.skips.append(_skip(number, row, Why.NO_RECORD, outcome.reason, source.id))
        on_row(number)


def _sources(
    rows: Iterable[Numbered], told: Told, pending: deque[_Pending]
) -> Iterator[tuple[PreferenceSource, Image.Image]]:
    load = lru_cache(_IMAGES_KEPT)(_load)
    for number, row in rows:
        made = _source(number, row, load, told.ids)
        if isinstance(made, Skip):
            told.skips.append(made)
            continue
        told.ids.add(made.source.id)
        pending.append(made)
        yield made.source, Image.open(io.BytesIO(made.png))


def _source(
    number: int, row: Row | Unusable, load: Callable[[Path | bytes], Prepared], known: set[str]
) -> _Pending | Skip:
    if isinstance(row, Unusable):
        return Skip(row=number, place=row.place, id=row.id, why=row.why, reason=row.reason)
    if row.id in known:
        return _duplicate(number, row, row.id)
    try:
        prepared = load(row.image)
    except OSError as error:
        return _skip(number, row, Why.MISSING_IMAGE, f"The image file cannot be read: {error.strerror}.")
    except InvalidImage as error:
        return _skip(number, row, Why.UNREADABLE_IMAGE, error.detail)
    source = _named(row, prepared)
    # A row without an id is named after its content: the same question asked twice is a duplicate too.
    return (
        _duplicate(number, row, source.id)
        if source.id in known
        else _Pending(number, source, prepared.png, row)
    )


def _load(image: Path | bytes) -> Prepared:
    return prepare(image if isinstance(image, bytes) else image.read_bytes(), limits=Limits())


def _named(row: Row, prepared: Prepared) -> PreferenceSource:
    digest = prepared.image.digest
    content = "\0".join([digest, row.question, row.answer])
    return PreferenceSource(
        id=row.id or f"row_{hashlib.sha256(content.encode()).hexdigest()[:32]}",
        image_digest=digest,
        study=row.study or f"local-{digest[:16]}",
        question=row.question,
        chosen=row.answer,
        consent=row.metadata.get("consent") is not False,
    )


def _duplicate(number: int, row: Row, identity: str | None) -> Skip:
    return _skip(number, row, Why.DUPLICATE_ID, "An earlier row has this id.", identity)


def _skip(number: int, row: Row, why: Why, reason: str, identity: str | None = None) -> Skip:
    return Skip(row=number, place=row.place, id=identity or row.id, why=why, reason=reason)
