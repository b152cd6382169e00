"""Tensors of a safetensors file, read without torch and without trust in what the file says of itself.

The format: 8 bytes of little-endian header length, a JSON header of name -> {dtype, shape, data_offsets},
then the tensors' bytes without gaps (https://github.com/huggingface/safetensors#format).
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hscr.errors import AdapterRefused

_LENGTH_BYTES = 8
_MAX_HEADER = 100 << 20
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_SAVE = "Save it again with safetensors."


class Tensor(NamedTuple):
    """What the header says; `begin` and `end` are places in the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors by name. Raises AdapterRefused unless they fill the file exactly, so a cut one is found."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            # A header that is cut off, or that lies about its length, is no JSON or leaves a gap.
            header = json.loads(file.read(min(length, _MAX_HEADER)), object_pairs_hook=_unique)
        start = _LENGTH_BYTES + length
        tensors = {name: _tensor(entry, start) for name, entry in header.items() if name != "__metadata__"}
        _require_filled(tensors, start, size)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterRefused(f"{path.name} cannot be read: {error}.", remedy=_SAVE) from error
    return tensors


def read_values(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Each tensor's values, flat. Raises AdapterRefused for other types than F32, F16 and BF16."""
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            kind = _DTYPES.get(tensor.dtype)
            if kind is None:
                raise AdapterRefused(f"{name} has type {tensor.dtype}.", remedy="Save F32, F16 or BF16.")
            if math.prod(tensor.shape) * kind.itemsize != tensor.end - tensor.begin:
                raise AdapterRefused(f"{name} has too many or too few bytes.", remedy=_SAVE)
            file.seek(tensor.begin)
            yield name, _float32(np.frombuffer(file.read(tensor.end - tensor.begin), kind))


def _tensor(entry: dict[str, Any], start: int) -> Tensor:
    begin, end = entry["data_offsets"]
    numbers = (begin, end, *entry["shape"])
    if not isinstance(entry["dtype"], str) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a shape or a place in it is no list of whole numbers")
    return Tensor(entry["dtype"], tuple(entry["shape"]), start + begin, start + end)


def _require_filled(tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.begin != at or tensor.end < tensor.begin:
            raise ValueError(f"{name} overlaps another tensor or leaves a gap")
        at = tensor.end
    if at != size:
        raise ValueError(f"it holds {size - start} bytes of weights where its header promises {at - start}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two entries with one name, another reader might take the other one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names something twice")
    return found


def _float32(raw: NDArray[Any]) -> NDArray[np.float32]:
    if raw.dtype == _DTYPES["BF16"]:  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)
