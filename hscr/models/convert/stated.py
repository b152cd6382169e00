"""What the JSON files of a model folder state."""

import json
from pathlib import Path
from typing import Any

from hscr.errors import InvalidCheckpoint


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file. Raises InvalidCheckpoint."""
    if not file.is_file():
        return {}
    try:
        stated = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{file} is no JSON.", remedy="Download it again.") from error
    if not isinstance(stated, dict):
        raise InvalidCheckpoint(f"{file} holds no JSON object.", remedy="Download it again.")
    return stated
