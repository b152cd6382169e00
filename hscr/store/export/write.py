"""Writing an export: a folder that is whole or absent, with a data set card."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from hscr.errors import Conflict
from hscr.parquet import fields, write_table
from hscr.records import now
from hscr.runs.canonical import CREATED, SCHEMA, SCHEMA_VERSION, VERSION, Stored, to_row
from hscr.store.export.card import Contents, card
from hscr.store.export.form import Form
from hscr.store.export.pairs import LlamaFactoryRow, Pair, RlaifvRow, SwiftRow, TrlRow, checked, pairs
from hscr.store.export.read import JSONL, image_path

Rows = Iterable[dict[str, Any]]


class Exported(NamedTuple):
    path: Path
    """of the file of rows"""
    records: int
    rows: int
    images: int


def export(records: Iterable[Stored], folder: Path, form: Form) -> Exported:
    """Write `folder` whole or not at all; records are taken one at a time.

    Raises:
        Conflict: the folder holds something.
        InvalidRecord: a record, by id, that the form's readers would misread or drop.
        Whatever `records` raises while it is read.
    """
    if folder.exists() and any(folder.iterdir()):
        raise Conflict(f"{folder} is not empty.", remedy="Name a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as private:
        aside = Path(private) / "export"  # with the usual permissions: only its owner may enter `private`
        aside.mkdir()
        contents = Contents(form)
        file, rows = _WRITERS[form](contents.counting(records), aside)
        (aside / "README.md").write_text(card(contents, file, rows), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    return Exported(folder / file, contents.records, rows, len(contents.images))


def _jsonl(records: Iterable[Stored], folder: Path) -> tuple[str, int]:
    kept = _keeping_images(records, folder)
    return JSONL, _lines(folder / JSONL, (stored.record.model_dump(mode="json") for stored in kept))


def _parquet(records: Iterable[Stored], folder: Path) -> tuple[str, int]:
    (folder / "records").mkdir()
    metadata = {VERSION: SCHEMA_VERSION, CREATED: now().isoformat()}
    file = "records/part-00000.parquet"
    return file, write_table(folder / file, SCHEMA, map(to_row, records), lambda: metadata)


def _trl(records: Iterable[Stored], folder: Path) -> tuple[str, int]:
    rows = (checked(pair, TrlRow.of) for pair in _pairs(records))
    return "train.parquet", write_table(folder / "train.parquet", pa.schema(fields(TrlRow)), rows)


def _rlaif_v(records: Iterable[Stored], folder: Path) -> tuple[str, int]:
    rows = (checked(p, partial(RlaifvRow.of, idx=n)) for n, p in zip(count(), _pairs(records), strict=False))
    # Its loader takes a name with `logp` for a file whose log-probs are known.
    return "train.parquet", write_table(folder / "train.parquet", pa.schema(fields(RlaifvRow)), rows)


def _llamafactory(records: Iterable[Stored], folder: Path) -> tuple[str, int]:
    kept = _pairs(_keeping_images(records, folder))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    entry = {"file_name": "train.jsonl", "formatting": "sharegpt", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"hscr": entry}, indent=2) + "\n", encoding="utf-8")
    return "train.jsonl", _lines(folder / "train.jsonl", (checked(p, LlamaFactoryRow.of) for p in kept))


def _ms_swift(records: Iterable[Stored], folder: Path) -> tuple[str, int]:
    kept = _pairs(_keeping_images(records, folder))
    return "train.jsonl", _lines(folder / "train.jsonl", (checked(p, SwiftRow.of) for p in kept))


def _pairs(records: Iterable[Stored]) -> Iterator[Pair]:
    return chain.from_iterable(map(pairs, records))


def _keeping_images(records: Iterable[Stored], folder: Path) -> Iterator[Stored]:
    for stored in records:
        path = folder / image_path(stored.record.image_digest)
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_bytes(stored.png)
        yield stored


def _lines(path: Path, rows: Rows) -> int:
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    return written


_WRITERS: dict[Form, Callable[[Iterable[Stored], Path], tuple[str, int]]] = {
    Form.JSONL: _jsonl,
    Form.PARQUET: _parquet,
    Form.TRL: _trl,
    Form.LLAMAFACTORY: _llamafactory,
    Form.MS_SWIFT: _ms_swift,
    Form.RLAIF_V: _rlaif_v,
}
