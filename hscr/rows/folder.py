"""Rows as a folder: a list beside the images, Parquet files, or one JSON file beside each image."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hscr.errors import InvalidInput
from hscr.rows.jsonl import NO_JSON, as_object, open_jsonl
from hscr.rows.parquet import open_parquet
from hscr.rows.row import Row, Unusable, Why, parse_row
from hscr.rows.source import RowSource

LISTS = ("rows.jsonl", "metadata.jsonl")
IMAGES = (".png", ".jpg", ".jpeg", ".dcm")

_Pair = tuple[Path, Path | None]
"""an image and its sidecar, which may be missing"""


def open_folder(path: Path, images: Path | None) -> RowSource:
    """In this order: `rows.jsonl` or `metadata.jsonl` (Hugging Face's imagefolder), `*.parquet`, sidecars.

    A sidecar of `a/scan.png` is `a/scan.json`: one object, or a list of them, with the keys of `parse_row`
    except the image's. Subfolders are searched, except a run's; the order is that of the paths. Which files
    there are is settled here: later ones are no rows. Raises InvalidInput when there is nothing of the kind,
    or two lists.
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
    pairs = _pairs(path)
    if not any(sidecar and _is_image(image) and image.is_file() for image, sidecar in pairs):
        raise InvalidInput(
            f"{path} holds no rows: no {' or '.join(LISTS)}, no *.parquet, "
            f"no image ({', '.join(IMAGES)}) with its JSON.",
            remedy="Name the file of the rows itself.",
        )
    digest, count = hashlib.sha256(), 0
    for image, sidecar in pairs:
        text = sidecar.read_bytes() if sidecar else b""
        digest.update(os.fsencode(image.relative_to(path)) + f"\0{len(text)}\0".encode() + text)
        count += len(_objects(text))
    return RowSource(digest.hexdigest(), count, lambda: _read(path, pairs))


def _pairs(path: Path) -> list[_Pair]:
    """Every image and every sidecar.

    A sidecar without an image stands for the other file of its name, whose content then says why it is none
    or that it is one after all, and where there is no such file for the PNG that is missing.
    """
    files = _files(path)
    images = [file for file in files if _is_image(file)]
    known = {image.with_suffix("") for image in images}
    sidecars = {file.with_suffix(""): file for file in files if file.suffix == ".json"}
    others = {file.with_suffix(""): file for file in files if file.suffix != ".json"}
    orphans = [
        others.get(name, sidecar.with_suffix(".png"))
        for name, sidecar in sidecars.items()
        if name not in known
    ]
    return [(image, sidecars.get(image.with_suffix(""))) for image in sorted([*images, *orphans])]


def _files(path: Path) -> list[Path]:
    """In order, without those of runs: `--out` may lie in here, and `--resume` must find the same rows."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    runs = {f.parent for f in files if f.name == "run.json" and (f.parent / "records").is_dir()} - {path}
    return [file for file in files if runs.isdisjoint(file.parents)]


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGES


def _read(path: Path, pairs: list[_Pair]) -> Iterator[Row | Unusable]:
    for image, sidecar in pairs:
        name = image.relative_to(path)
        # A name that is no UTF-8 can be opened, not written down.
        place = os.fsencode(name).decode(errors="backslashreplace")
        beside = Path(place).with_suffix(".json").name
        if sidecar is None:
            yield Unusable(place, None, Why.EMPTY_QUESTION, f"{place} has no {beside} beside it.")
            continue
        for values in _objects(sidecar.read_bytes()):
            if values is None:
                yield Unusable(place, None, Why.MALFORMED, f"{beside} holds what is no JSON object in UTF-8.")
            else:
                yield parse_row({**values, "image": str(name)}, place, path)


def _objects(text: bytes) -> list[dict[str, Any] | None]:
    """Of a sidecar, never none at all: each that is no object is None."""
    try:
        values = json.loads(text)
    except NO_JSON:
        return [None]
    listed = values if values and isinstance(values, list) else [values]
    return [as_object(each) for each in listed]
