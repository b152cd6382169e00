"""The checkpoints of one run, and which of them may be continued from."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hscr.errors import Conflict

_RUN, _COMPLETE = "run.json", "complete"


class Checkpoints(TrainerCallback):  # type: ignore[misc]  # transformers ships no usable types
    """A folder of `checkpoint-<step>` folders: adapter, optimizer, schedule, random states, history."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """identity: what a run must have in common with the one it continues."""
        self.folder, self._identity = folder, identity

    def begin(self) -> None:
        """Forget what an earlier run left, and write down whose checkpoints these will be."""
        self.discard()
        self.folder.mkdir(parents=True)
        (self.folder / _RUN).write_text(json.dumps(self._identity, sort_keys=True))

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None before the first.

        Raises Conflict when they are of a run on other records, with another model or configuration.
        """
        file = self.folder / _RUN
        if not file.is_file():
            return None
        before = json.loads(file.read_text())
        differing = [name for name, value in self._identity.items() if before.get(name) != value]
        if differing:
            raise Conflict(
                f"The checkpoints in {self.folder} are of another run: {', '.join(differing)} differ.",
                remedy="Repeat the run as it was, or start anew without resuming.",
            )
        complete = [marker.parent for marker in self.folder.glob(f"checkpoint-*/{_COMPLETE}")]
        return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def discard(self) -> None:
        """Remove them all."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def on_save(self, args: Any, state: Any, _control: Any, **_further: Any) -> None:
        # What a killed run was about to write lacks this mark and is passed over.
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()
