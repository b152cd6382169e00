"""Parquet as this project writes it: whole files or none, columns named after pydantic fields, and `datasets`
finds its images by itself."""

import json
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from hscr.durable import sync

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""how Hugging Face's `datasets` stores an image"""

_ROWS_PER_GROUP = 32
_SCALARS = {
    str: pa.string(),
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    bytes: pa.binary(),
    datetime: pa.timestamp("us", tz="UTC"),
}
# Rows about one image lie side by side: a dictionary of this size stores its bytes once per row group.
_DICTIONARY_BYTES = 64 << 20


def arrow_type(annotation: Any) -> pa.DataType:
    """Of a pydantic field: scalars, literals, `T | None`, `tuple[T, ...]`, `list[T]` and models."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in {tuple, list}:
        return pa.list_(arrow_type(arguments[0]))
    if origin in {Union, types.UnionType, Annotated}:
        return arrow_type(arguments[0])  # None comes second, and what annotates a type after it
    if origin is Literal:
        return arrow_type(type(arguments[0]))
    if annotation is Image:
        return IMAGE
    if issubclass(annotation, BaseModel):
        return pa.struct(fields(annotation))
    return next(found for known, found in _SCALARS.items() if issubclass(annotation, known))


def fields(model: type[BaseModel]) -> list[pa.Field]:
    return [
        pa.field(field.alias or name, arrow_type(field.annotation))
        for name, field in model.model_fields.items()
    ]


class Image(BaseModel):
    """The file's bytes, and a name for it."""

    bytes: "bytes"
    path: str


def write_table(
    path: Path,
    schema: pa.Schema,
    rows: Iterable[Mapping[str, Any]],
    metadata: Callable[[], Mapping[str, str]] = dict,
) -> int:
    """Write rows a few at a time and return their number; `path` exists whole or not at all, even after a
    power cut. `metadata` is asked for the file's key-value metadata when the last row is written."""
    aside = path.with_name(f"{path.name}.part")
    options = {"compression": "zstd", "dictionary_pagesize_limit": _DICTIONARY_BYTES}
    count, schema = 0, schema.with_metadata(hugging_face(schema))
    with pq.ParquetWriter(aside, schema, **options) as writer:
        for group in _groups(rows):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
        writer.add_key_value_metadata(dict(metadata()))
    commit(aside, path)
    return count


def commit(aside: Path, path: Path) -> None:
    """Give a finished file its name, durably."""
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    commit(aside, path)


def hugging_face(schema: pa.Schema) -> dict[str, str]:
    """Schema metadata by which `datasets` knows that an image is one; older releases read it too."""
    return {"huggingface": json.dumps({"info": {"features": {f.name: _feature(f.type) for f in schema}}})}


def _feature(kind: pa.DataType) -> Any:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        inner = _feature(kind.value_type)
        # A list of structs is written as a list: `Sequence` of a dict is a dict of lists to `datasets`.
        return {"feature": inner, "_type": "Sequence"} if "_type" in inner else [inner]
    names = {pa.float64(): "float64", pa.timestamp("us", tz="UTC"): "timestamp[us, tz=UTC]"}
    return {"dtype": names.get(kind, str(kind)), "_type": "Value"}


def _groups(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    iterator = iter(rows)
    while group := list(islice(iterator, _ROWS_PER_GROUP)):
        yield group
