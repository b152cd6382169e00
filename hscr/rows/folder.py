"""Rows as a folder: a list beside the images, Parquet files, or one JSON file beside each image."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hscr.errors import InvalidInput
from hscr.rows.jsonl import open_jsonl
from hscr.rows.parquet import open_parquet
from hscr.rows.row import Row, Unusable, Why, parse_row
from hscr.rows.source import RowSource

LISTS = ("rows.jsonl", "metadata.jsonl")
IMAGES = {".png", ".jpg", ".jpeg", ".dcm"}


def open_folder(path: Path, images: Path | None) -> RowSource:
    """In this order: `rows.jsonl` or `metadata.jsonl` (Hugging Face's imagefolder), `*.parquet`, sidecars.

    A sidecar of `a/scan.png` is `a/scan.json`: one object, or a list of them, with the keys of `parse_row`
    except the image's. Subfolders are searched; the order is that of the paths. Raises InvalidInput when
    there is nothing of the kind, or two lists.
    """
    lists = [path / name for name in LISTS if (path / name).is_file()]
    if len(lists) > 1:
        raise InvalidInput(f"{path} holds {' and '.join(LISTS)}.", remedy="Give one of these files itself.")
    if lists:
        return open_jsonl(lists[0], images or path)
    parquet = sorted(path.glob("*.parquet"))
    if parquet:
        return open_parquet(parquet, images or path)
    return _open_sidecars(path)


def _open_sidecars(path: Path) -> RowSource:
    pairs = list(_pairs(path))
    if not any(image.is_file() and sidecar.is_file() for image, sidecar in pairs):
        raise InvalidInput(
            f"{path} holds no rows: no {' or '.join(LISTS)}, no *.parquet, no image with its JSON.",
            remedy="Name the file of the rows itself.",
        )
    digest, count = hashlib.sha256(), 0
    for image, sidecar in pairs:
        text = sidecar.read_bytes() if sidecar.is_file() else b""
        digest.update(f"{image.relative_to(path)}\0{len(text)}\0".encode() + text)
        count += max(1, len(_objects(text)))
    return RowSource(digest.hexdigest(), count, lambda: _read(path))


def _pairs(path: Path) -> Iterator[tuple[Path, Path]]:
    """Each image with the place of its sidecar; a sidecar without an image stands for its PNG."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    images = [file for file in files if file.suffix.lower() in IMAGES]
    known = {image.with_suffix("") for image in images}
    orphans = [f.with_suffix(".png") for f in files if f.suffix == ".json" and f.with_suffix("") not in known]
    return ((image, image.with_suffix(".json")) for image in sorted([*images, *orphans]))


def _read(path: Path) -> Iterator[Row | Unusable]:
    for image, sidecar in _pairs(path):
        place = str(image.relative_to(path))
        if not sidecar.is_file():
            yield Unusable(place, None, Why.EMPTY_QUESTION, f"{place} has no {sidecar.name} beside it.")
            continue
        objects = _objects(sidecar.read_bytes())
        if not objects:
            yield Unusable(place, None, Why.MALFORMED, f"{sidecar.name} holds no JSON object.")
        for values in objects:
            yield parse_row({**values, "image": str(image.relative_to(path))}, place, path)


def _objects(text: bytes) -> list[dict[str, Any]]:
    """Of a sidecar; empty where it is something else."""
    try:
        values = json.loads(text)
    except ValueError:
        return []
    listed = values if isinstance(values, list) else [values]
    return listed if all(isinstance(each, dict) for each in listed) else []
