"""Reading the text and image side of a model's folder."""

from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from hscr.errors import InvalidCheckpoint


def read_processor(folder: str | Path) -> Any:
    """Tokenizer, image processor and chat template of a model's folder.

    Raises InvalidCheckpoint for a file that says something else than it should; OSError, ValueError, KeyError
    for what is not there.
    """
    try:
        return AutoProcessor.from_pretrained(folder)
    except (AttributeError, TypeError) as error:
        raise InvalidCheckpoint(
            f"{folder}: a configuration of the tokenizer or the image processor cannot be read: {error}.",
            remedy="Delete that folder and convert or download the model again.",
        ) from error
