"""Preference records as folders that other trainers read: a JSONL file beside `images/<digest>.png`."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from hscr.errors import Conflict, InvalidConfig, InvalidRecord
from hscr.records import PreferenceRecord

IMAGES = "images"
RECORDS = "records.jsonl"


class Exported(NamedTuple):
    path: Path
    """of the JSONL file"""
    records: int
    rows: int
    images: int


def export(
    records: Iterable[PreferenceRecord], image: Callable[[str], bytes], folder: Path, form: str
) -> Exported:
    """Write `folder` whole or not at all.

    Args:
        records: what to write, in this order.
        image: the PNG bytes of a digest.
        folder: must not exist yet, or be empty.
        form: `jsonl` keeps everything and can be read back; `trl` has one row per dispreferred answer.

    Raises:
        InvalidConfig: unknown form.
        Conflict: the folder holds something.
        NotFound: an image that `image` does not have.
    """
    if form not in FORMS:
        raise InvalidConfig(f"There is no export form {form}.", remedy=f"Known: {', '.join(FORMS)}.")
    if folder.exists() and any(folder.iterdir()):
        raise Conflict(f"{folder} is not empty.", remedy="Name a new folder.")
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / IMAGES).mkdir(parents=True)
    shape = FORMS[form]
    written = rows = 0
    with (aside / shape.file).open("w", encoding="utf-8") as file:
        for record in records:
            path = aside / image_path(record.image_digest)
            if not path.exists():
                path.write_bytes(image(record.image_digest))
            for row in shape.rows(record):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                rows += 1
            written += 1
    (aside / "README.md").write_text(shape.readme, encoding="utf-8")
    images = len(list((aside / IMAGES).iterdir()))
    if folder.exists():
        folder.rmdir()
    aside.rename(folder)
    return Exported(folder / shape.file, written, rows, images)


def read_records(path: Path) -> list[PreferenceRecord]:
    """Read a `jsonl` export back. Raises InvalidRecord that names the line, Conflict for a missing file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidRecord(
            f"{path} cannot be read: {error.strerror}.",
            remedy="`hscr generate --input` and `hscr export --form jsonl` write such a file.",
        ) from error
    return [_parse(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def image_path(digest: str) -> str:
    """Of an image, relative to the JSONL file."""
    return f"{IMAGES}/{digest}.png"


def _parse(line: str, number: int) -> PreferenceRecord:
    try:
        return PreferenceRecord.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "row"
        raise InvalidRecord(
            f"Line {number} is no preference record: {place}: {first['msg']}.",
            remedy="Export the records again.",
        ) from error


class Form(NamedTuple):
    file: str
    rows: Callable[[PreferenceRecord], Iterator[dict[str, Any]]]
    readme: str


def _whole(record: PreferenceRecord) -> Iterator[dict[str, Any]]:
    yield record.model_dump(mode="json")


def _trl(record: PreferenceRecord) -> Iterator[dict[str, Any]]:
    """TRL's conversational vision preference format; it inserts the image placeholder by itself."""
    for response in record.rejected:
        yield {
            "images": [image_path(record.image_digest)],
            "prompt": [{"role": "user", "content": record.question}],
            "chosen": [{"role": "assistant", "content": record.chosen}],
            "rejected": [{"role": "assistant", "content": response.text}],
        }


_RESEARCH_ONLY = "For research use only. The images keep the consent they were collected under.\n"

_TRL_README = f"""# Preference pairs for TRL's DPOTrainer

One row per preferred and dispreferred answer; `images` holds paths relative to this folder.

```python
from datasets import Image, Sequence, load_dataset

folder = "."  # where this file is
rows = load_dataset("json", data_files=f"{{folder}}/train.jsonl", split="train")
rows = rows.map(lambda row: {{"images": [f"{{folder}}/{{path}}" for path in row["images"]]}})
rows = rows.cast_column("images", Sequence(Image()))
```

{_RESEARCH_ONLY}"""

_JSONL_README = f"""# Preference records

One record per line: an image (`images/<image_digest>.png`), a question, the preferred answer and its
dispreferred ones by descending similarity, with all that made them. `hscr finetune --records {RECORDS}`
trains on them.

{_RESEARCH_ONLY}"""

FORMS = {
    "jsonl": Form(RECORDS, _whole, _JSONL_README),
    "trl": Form("train.jsonl", _trl, _TRL_README),
}
