"""Weight files as they lie in a model folder: tensors by name, each read from disk when it is asked for."""

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hscr.errors import InvalidCheckpoint, NotFound
from hscr.models.convert.stated import read_json

_Reader = Callable[[str], Tensor]
_NAMES = ("model.safetensors", "pytorch_model.bin")
_TENSORS_ALONE = "Save the model's `state_dict()` alone."
# A damaged pickle fails in whatever its bytes say next.
_DAMAGED = (
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
    OSError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)


class Weights(Mapping[str, Tensor]):
    """Every tensor of a folder's safetensors or, where there are none, of its pickled files.

    Files are memory-mapped and never copied whole. Pickles may hold tensors only (`weights_only`).
    """

    def __init__(self, folder: Path) -> None:
        """Raises NotFound, InvalidCheckpoint."""
        self.files = _weight_files(folder)
        self._readers: dict[str, _Reader] = {}
        for file in self.files:
            self._readers |= _open(file)

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name](name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _weight_files(folder: Path) -> list[Path]:
    for name in _NAMES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _present(folder, _indexed(index))
        if (folder / name).is_file():
            return [folder / name]
    raise NotFound(
        f"{folder} holds no weights.", remedy=f"Download {_NAMES[0]} or {_NAMES[1]}, with index and shards."
    )


def _indexed(index: Path) -> list[str]:
    where = read_json(index).get("weight_map")
    if not (isinstance(where, dict) and where and all(isinstance(name, str) for name in where.values())):
        raise InvalidCheckpoint(f"{index} names no weight files.", remedy="Download it again.")
    return sorted(set(where.values()))


def _present(folder: Path, names: list[str]) -> list[Path]:
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise NotFound(f"{folder} lacks the weight files {', '.join(absent)}.", remedy="Finish the download.")
    return [folder / name for name in names]


def _open(file: Path) -> dict[str, _Reader]:
    try:
        if file.suffix == ".safetensors":
            # The handle keeps the mapping alive; it has no close but its end.
            handle = safe_open(file, "pt")
            return dict.fromkeys(list(handle.keys()), handle.get_tensor)  # type: ignore[no-untyped-call]
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except _DAMAGED as error:
        # The error's own text is left out: torch's advises to run what the pickle says.
        raise InvalidCheckpoint(
            f"{file} cannot be read as tensors: it is damaged, another kind of file, or not readable to you.",
            remedy="Download it again.",
        ) from error
    return dict.fromkeys(_named_tensors(file, state), state.__getitem__)


def _named_tensors(file: Path, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise InvalidCheckpoint(
            f"{file} holds no tensors by name but a {type(state).__name__}.", remedy=_TENSORS_ALONE
        )
    other = [
        name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if other:
        raise InvalidCheckpoint(
            f"{file} holds more than tensors by name: {other[0]!r} is none.", remedy=_TENSORS_ALONE
        )
    return state
