"""`--input`: one name for every layout that rows come in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hscr.errors import InvalidInput
from hscr.rows.row import Row, Unusable

VQA_RAD = "vqa-rad:"


@dataclass(frozen=True)
class RowSource:
    """Rows that can be read again and again, one at a time, in one order."""

    digest: str
    """SHA-256, hex, of the files that hold the rows; of image files beside them only the names count"""
    count: int
    """rows, unusable ones included"""
    read: Callable[[], Iterator[Row | Unusable]]


def open_rows(given: str, images: Path | None = None) -> RowSource:
    """Find out what `given` is: `vqa-rad:PATH`, a folder, a `.parquet` file, or a JSONL file.

    `images` is the folder that image paths start from; by default where the rows are. Reads the rows' files
    once, to count and digest them. Raises InvalidInput that says what is wrong with the path, or
    that it holds no rows.
    """
    vqa_rad = given.startswith(VQA_RAD)
    path = Path(given.removeprefix(VQA_RAD))
    if not path.exists():
        raise InvalidInput(f"{path} does not exist.", remedy="Give the path of the rows by --input.")
    try:
        source = _open(path, images, vqa_rad=vqa_rad)
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be read: {error.strerror or error}.", remedy="Check the path and its rights."
        ) from error
    if not source.count:
        raise InvalidInput(f"{path} holds no rows.", remedy="Name the file of the rows itself.")
    return source


def _open(path: Path, images: Path | None, *, vqa_rad: bool) -> RowSource:
    # pyarrow takes a third of a second to import, and only one of the layouts needs it.
    from hscr.rows import folder, jsonl, parquet, vqa_rad as osf  # noqa: PLC0415, I001

    if vqa_rad:
        return osf.open_vqa_rad(path, images)
    if path.is_dir():
        return folder.open_folder(path, images)
    if path.suffix.lower() == ".parquet":
        return parquet.open_parquet([path], images or path.parent)
    if path.suffix.lower() == ".jsonl":
        return jsonl.open_jsonl(path, images or path.parent)
    raise InvalidInput(
        f"{path} is neither a folder nor a .jsonl or .parquet file.",
        remedy=f"Convert it to one of these, or give {VQA_RAD}PATH for VQA-RAD.",
    )
