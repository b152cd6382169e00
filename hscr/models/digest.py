"""Names for weights: digests over a model folder's files, computed without torch and without loading them."""

import hashlib
import json
from pathlib import Path

from hscr.errors import NotFound

_SUFFIXES = {".json", ".jinja", ".model", ".safetensors"}
_NAMES = {"merges.txt", "vocab.txt"}


def model_digest(path: str | Path) -> str:
    """SHA-256, hex, over name and content of every file that can change an answer, in sorted name order.

    Weights, configurations, tokenizer and chat template count; cards and pictures do not.
    Raises NotFound when the folder holds no model.
    """
    folder = Path(path)
    files = sorted(file for file in folder.glob("*") if file.suffix in _SUFFIXES or file.name in _NAMES)
    if not (folder / "config.json").is_file():
        raise NotFound(f"{folder} holds no config.json.", remedy="Give the folder of a saved model.")
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.name}\0{content}\n".encode())
    return total.hexdigest()


def template_digest(path: str | Path) -> str:
    """SHA-256, hex, of the chat template's text, wherever the folder keeps it.

    Raises NotFound when there is none.
    """
    folder = Path(path)
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return hashlib.sha256(jinja.read_bytes()).hexdigest()
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        file = folder / name
        template = json.loads(file.read_text()).get("chat_template") if file.is_file() else None
        if isinstance(template, str):
            return hashlib.sha256(template.encode()).hexdigest()
    raise NotFound(f"{folder} holds no chat template.", remedy="Save the processor with its chat template.")
