"""The checkpoint of one run, and whether it may be continued from."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from hscr.durable import sync
from hscr.errors import Conflict
from hscr.faults import fault_point

_MANIFEST, _ASIDE = "manifest.json", "aside"
_ANEW = "Repeat the run as it was, or start anew without resuming."


class Checkpoints(TrainerCallback):  # type: ignore[misc]  # transformers ships no usable types
    """A folder that holds one `checkpoint-<step>`: adapter, optimizer, schedule, random states, history.

    The trainer writes into `aside`; what is whole is synced and renamed, and replaces the one before.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, str],
        wanted: Callable[[], bool] = lambda: False,
        on_kept: Callable[[], None] = lambda: None,
    ) -> None:
        """identity: what a run must have in common with the one it continues.

        `wanted` is asked after each step whether to write one now, besides those that are due; `on_kept` is
        called when one has replaced the one before.
        """
        self.folder, self.aside = folder, folder / _ASIDE
        self._identity, self._wanted, self._on_kept = identity, wanted, on_kept
        self._step = self._kept = 0

    @property
    def behind(self) -> bool:
        """Whether a checkpoint is wanted and the steps since the last one are not in it."""
        return self._wanted() and self._kept < self._step

    def begin(self) -> None:
        """Forget what an earlier run left."""
        self.discard()
        self.folder.mkdir(parents=True)

    def latest(self) -> Path | None:
        """The newest whole checkpoint; None before the first.

        Raises Conflict when it is damaged, or of a run on other records, with another model, configuration
        or code.
        """
        whole = self.folder.glob(f"checkpoint-*/{_MANIFEST}")
        found = max((manifest.parent for manifest in whole), key=step_of, default=None)
        if found is not None:
            self._check(found)
        return found

    def discard(self) -> None:
        """Remove them all."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_further: Any) -> None:
        self._step = self._kept = state.global_step

    def on_step_end(self, _args: Any, state: Any, control: Any, **_further: Any) -> None:
        self._step = state.global_step
        if self._wanted():
            control.should_save = True

    def on_save(self, args: Any, state: Any, _control: Any, **_further: Any) -> None:
        PartialState().wait_for_everyone()  # the other processes' random states belong to it
        self._kept = state.global_step
        if state.is_world_process_zero:
            self._publish(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _publish(self, written: Path) -> None:
        manifest = {"identity": self._identity, "files": _digests(written)}
        (written / _MANIFEST).write_text(json.dumps(manifest, sort_keys=True))
        for path in (*written.rglob("*"), written):
            sync(path)
        before = list(self.folder.glob("checkpoint-*"))
        target = self.folder / written.name
        if target in before:  # one that was passed over
            shutil.rmtree(target)
        fault_point("checkpoint.aside")
        written.rename(target)
        sync(self.folder)
        fault_point("checkpoint.kept")
        for path in before:
            shutil.rmtree(path, ignore_errors=True)
        self._on_kept()

    def _check(self, checkpoint: Path) -> None:
        try:
            manifest = json.loads((checkpoint / _MANIFEST).read_text())
            before, files = dict(manifest["identity"]), dict(manifest["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise Conflict(f"The manifest of {checkpoint.name} is damaged.", remedy=_ANEW) from error
        names = before.keys() | self._identity.keys()
        differing = sorted(name for name in names if before.get(name) != self._identity.get(name))
        if differing:
            raise Conflict(f"{checkpoint.name} is of another run: {_listed(differing)}.", remedy=_ANEW)
        if _digests(checkpoint) != files:
            raise Conflict(f"{checkpoint.name} is damaged on disk.", remedy=_ANEW)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _listed(names: list[str]) -> str:
    return f"{', '.join(names)} {'differs' if len(names) == 1 else 'differ'}"


def _digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): _digest(path) for path in _files(folder)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _MANIFEST)
