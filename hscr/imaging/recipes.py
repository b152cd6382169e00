"""Named, versioned, digested preprocessing: what every answer's provenance points to.

A recipe's name says what was done (`raster@1`, `dicom-voi@1`, `dicom-ct-lung@1`), its parameters say with
which values, its digest covers both. Whoever changes what a recipe does raises the number behind its `@`.
"""

import hashlib
import io
import json
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from hscr.records import Recipe

MAX_SIDE = 1024
"""Longest side of a prepared image, pixels."""

OUTPUT = {"max_side": MAX_SIDE, "resample": "lanczos", "depth": 8}


@dataclass(frozen=True)
class Pixels:
    """A decoded picture, upright, mode L (one channel) or RGB, with the recipe that made it."""

    image: Image.Image
    recipe: str
    parameters: dict[str, Any]
    modality: str | None = None
    study: str | None = None
    tags: dict[str, str | int] = field(default_factory=dict)


def recipe(name: str, parameters: dict[str, Any]) -> Recipe:
    """The recipe with `digest` = SHA-256 over the canonical JSON of name and parameters, hex."""
    canonical = json.dumps({"name": name, "parameters": parameters}, sort_keys=True, separators=(",", ":"))
    return Recipe(name=name, digest=hashlib.sha256(canonical.encode()).hexdigest(), parameters=parameters)


def bounded(image: Image.Image) -> Image.Image:
    """The image with its longest side at most `MAX_SIDE`, aspect kept."""
    scale = MAX_SIDE / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def encoded(image: Image.Image) -> bytes:
    """PNG bytes without any metadata: the same pixels always give the same bytes. Grey stays one channel."""
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    buffer = io.BytesIO()
    bare.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()
