"""Rows as Parquet, read a few at a time: what `datasets` and the hub store."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hscr.errors import InvalidInput
from hscr.rows.row import Row, Unusable, parse_row
from hscr.rows.source import RowSource

_ROWS_AT_ONCE = 16


def open_parquet(paths: Sequence[Path], images: Path) -> RowSource:
    """Columns `question`, `answer` and `image` (or `images`, `file_name`); further ones as in `parse_row`.

    An image is `struct<bytes, path>` as Hugging Face stores it, binary, or a path below `images`. Raises
    InvalidInput that names the file and the column.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    count = sum(_checked(path) for path in paths)
    return RowSource(digest.hexdigest(), count, lambda: _read(paths, images))


def _checked(path: Path) -> int:
    try:
        with pq.ParquetFile(path) as file:
            names, count = set(file.schema_arrow.names), file.metadata.num_rows
    except pa.ArrowInvalid as error:
        raise InvalidInput(f"{path} is no Parquet file.", remedy="Give a file that is whole.") from error
    for wanted in ({"question"}, {"answer"}, {"image", "images", "file_name"}):
        if not names & wanted:
            raise InvalidInput(
                f"{path} has no column {' or '.join(sorted(wanted))}; it has {', '.join(sorted(names))}.",
                remedy="Rename its columns to image, question and answer.",
            )
    return count


def _read(paths: Sequence[Path], images: Path) -> Iterator[Row | Unusable]:
    number = 0
    for path in paths:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for values in batch.to_pylist():
                    number += 1
                    yield parse_row(values, f"row {number}", images)
