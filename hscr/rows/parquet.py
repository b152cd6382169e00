"""Rows as Parquet, read a few at a time: what `datasets` and the hub store."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hscr.errors import InvalidInput
from hscr.rows.row import Row, Unusable, parse_row
from hscr.rows.source import RowSource

_ROWS_AT_ONCE = 16
_IMAGES = {"image", "images", "file_name"}
_READ = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer,
    pa.types.is_floating, pa.types.is_boolean, pa.types.is_binary, pa.types.is_large_binary,
    pa.types.is_binary_view,
)  # fmt: skip


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
    except pa.ArrowException as error:
        raise InvalidInput(f"{path} is no Parquet file.", remedy="Give a file that is whole.") from error
    for wanted in ({"question"}, {"answer"}, _IMAGES):
        if not names & wanted:
            raise InvalidInput(
                f"{path} has no column {' or '.join(sorted(wanted))}; it has {', '.join(sorted(names))}.",
                remedy="Rename its columns to image, question and answer.",
            )
    return count


def _read(paths: Sequence[Path], images: Path) -> Iterator[Row | Unusable]:
    for number, values in enumerate(chain.from_iterable(map(_values, paths)), 1):
        yield parse_row(values, f"row {number}", images)


def _values(path: Path) -> Iterator[dict[str, Any]]:
    """Raises InvalidInput where the file opens and yet cannot be read through."""
    done = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = [field.name for field in file.schema_arrow if _is_read(field)]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()
                done += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InvalidInput(
            f"{path} cannot be read from row {done + 1} on: it is damaged, or holds text that is no UTF-8.",
            remedy="Write the file again.",
        ) from error


def _is_read(field: pa.Field) -> bool:
    # Python has no value for some dates, times and zones: a column nobody asked for is none to fail on.
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return field.name in _IMAGES or any(is_kind(kind) for is_kind in _READ)
