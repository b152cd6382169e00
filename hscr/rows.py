"""JSONL rows a person brings: an image file, a question about it, and the answer known to be right."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hscr.errors import InvalidRecord


class Row(BaseModel):
    """`image` is a path below the images' folder. Further keys, as datasets have them, are ignored."""

    model_config = ConfigDict(frozen=True)

    image: str = Field(min_length=1)
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    id: str | None = None
    study: str | None = None


def read_rows(path: Path) -> list[Row]:
    """Raises InvalidRecord that names the file or the line and key."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRecord(
            f"{path} cannot be read.", remedy="Give a JSONL file in UTF-8; `hscr phantom sample` makes one."
        ) from error
    return [_row(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def row_image(folder: Path, row: Row) -> bytes:
    """The image file's bytes. Raises InvalidRecord that names the file."""
    path = folder / row.image
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRecord(
            f"The image {path} cannot be read: {error.strerror}.",
            remedy="Check the row's path and the images' folder.",
        ) from error


def _row(line: str, number: int) -> Row:
    try:
        return Row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "row"
        raise InvalidRecord(
            f"Line {number} cannot be used: {key}: {first['msg']}.",
            remedy='Each line is a JSON object {"image": path, "question": text, "answer": text}.',
        ) from error
