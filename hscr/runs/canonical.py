"""The canonical store of preference records: Parquet, one row per image and prompt, images inside.

The columns are the record's own fields, except: `images` holds the PNG; `responses` are the dispreferred
answers with their `level` (1 is the most similar to the preferred answer); `metadata` is the input row's
further keys as JSON; `created_at` is the run's start, in the file's metadata with all else that is the same
for every row.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from hscr.errors import InvalidRecord
from hscr.parquet import IMAGE, arrow_type, fields
from hscr.records import PreferenceRecord, Response

SCHEMA_VERSION = "1"
VERSION, CREATED = "hscr.schema_version", "hscr.created_at"
_ROWS_AT_ONCE = 16

_RESPONSE = pa.struct([pa.field("level", pa.int64()), *fields(Response)])
_OWN = [field for field in fields(PreferenceRecord) if field.name not in {"rejected", "created_at"}]
SCHEMA = pa.schema(
    [
        pa.field("images", pa.list_(IMAGE)),
        *_OWN,
        pa.field("responses", pa.list_(_RESPONSE)),
        pa.field("metadata", arrow_type(str)),
    ]
)


class Stored(NamedTuple):
    record: PreferenceRecord
    png: bytes
    metadata: Mapping[str, Any]


def to_row(stored: Stored) -> dict[str, Any]:
    record = stored.record
    responses = [{"level": n, **each.model_dump(mode="json")} for n, each in enumerate(record.rejected, 1)]
    return {
        **record.model_dump(mode="json", exclude={"rejected", "created_at"}),
        "images": [{"bytes": stored.png, "path": f"{record.image_digest}.png"}],
        "responses": responses,
        "metadata": json.dumps(stored.metadata, ensure_ascii=False, sort_keys=True),
    }


def read_part(path: Path, *, images: bool = True) -> Iterator[Stored]:
    """Records of one file, a few at a time; without `images` their bytes are not read and `png` is empty.

    Raises InvalidRecord for a file that is none, or that a newer version wrote.
    """
    try:
        with pq.ParquetFile(path) as file:
            created = _created(path, file)
            columns = [name for name in file.schema_arrow.names if images or name != "images"]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                yield from (_from_row(path, row, created) for row in batch.to_pylist())
    except (OSError, pa.ArrowInvalid) as error:
        raise InvalidRecord(
            f"{path} cannot be read as Parquet.", remedy="Give a whole file that `hscr generate` wrote."
        ) from error


def _created(path: Path, file: pq.ParquetFile) -> datetime:
    known = file.metadata.metadata or {}
    version = known.get(VERSION.encode(), b"").decode()
    if version != SCHEMA_VERSION:
        raise InvalidRecord(
            f"{path} has records of schema {version or 'unknown'}; this program reads {SCHEMA_VERSION}.",
            remedy="Give a file of `hscr generate` or `hscr export --format parquet` of this version.",
        )
    return datetime.fromisoformat(known[CREATED.encode()].decode()).astimezone(UTC)


def _from_row(path: Path, row: dict[str, Any], created: datetime) -> Stored:
    images = row.pop("images", None)
    metadata = json.loads(row.pop("metadata"))
    responses = [{k: v for k, v in each.items() if k != "level"} for each in row.pop("responses")]
    try:
        record = PreferenceRecord.model_validate({**row, "rejected": responses, "created_at": created})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRecord(
            f"{path}: {row.get('id')}: {'.'.join(map(str, first['loc']))}: {first['msg']}.",
            remedy="Generate the records again.",
        ) from error
    return Stored(record, images[0]["bytes"] if images else b"", metadata)
