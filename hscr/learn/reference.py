"""The frozen reference's log-probs on disk, in a file that is named after all they depend on."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from hscr.learn.examples import Example, digest
from hscr.models.vlm import VLM

_log = logging.getLogger(__name__)


def reference_file(folder: Path, vlm: VLM, examples: Sequence[Example], adapter: str | None = None) -> Path:
    """Where the log-probs of these examples' answers belong.

    The name is the SHA-256 of the model's digest (weights and tokenizer), the digest of the reference's
    adapter (none by default), the chat template's, device and dtype, and of every record its image and
    tokens: a change of any of them is another file.
    """
    depends = [vlm.digest, adapter, vlm.template_digest, vlm.numeric_mode, digest(examples)]
    return folder / f"reference-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()}.json"


def read_reference(file: Path, examples: Sequence[Example]) -> dict[str, Tensor]:
    """[1 + J] fp32 log-probs by record id, exactly as they were written; none of them from a damaged file."""
    try:
        found = {name: torch.tensor(row) for name, row in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, AttributeError):
        found = {}
    whole = {example.record.id: len(example.completions) for example in examples}
    if {name: row.numel() for name, row in found.items()} != whole:
        _log.warning("%s is damaged, so its log-probs are computed again", file)
        return {}
    return found


def write_reference(file: Path, logps: Mapping[str, Tensor]) -> None:
    """Written aside and renamed, so that no other run reads a half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{uuid4().hex}")
    aside.write_text(json.dumps({name: row.tolist() for name, row in logps.items()}))
    aside.replace(file)
