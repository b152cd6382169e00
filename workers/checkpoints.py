"""What a long job has come to, kept for the next attempt, on whichever machine that runs.

`checkpoints/<job id>/<attempt>/` under the blobs' root holds of a fine-tune `records.json`, the ids that are
trained on, and `steps`, the trainer's own; of an evaluation `answers.jsonl`. It belongs to the job: an
attempt takes over what the one before left by renaming it, so that a zombie finds its folder gone; whatever a
zombie writes after that is in a folder that nobody reads and that goes with the job.

Where machines share no disk, what is kept is handed over through the bucket at each checkpoint, and when an
evaluation stops. What a zombie hands over is older, and as sound: the next attempt only repeats some steps.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from hscr.errors import NotFound, ObjectStoreUnavailable
from hscr.faults import fault_point
from hscr.store.blobs import Blobs
from hscr.store.store import Store
from workers.leases import AttemptOver, Lease

log = logging.getLogger(__name__)

_RECORDS, _STEPS, _ANSWERS = "records.json", "steps", "answers.jsonl"


class Kept:
    """One attempt's folder."""

    def __init__(self, folder: Path, blobs: Blobs) -> None:
        self.folder = folder
        self._blobs = blobs

    @property
    def steps(self) -> Path:
        """Where the trainer keeps its checkpoint; may not exist."""
        return self.folder / _STEPS

    @classmethod
    def take_over(cls, store: Store, lease: Lease) -> Self:
        """What the attempt before left, or an empty folder. Raises LeaseLost, ObjectStoreUnavailable."""
        ours = _folder(store) / lease.job.id
        folder = ours.absolute() / str(lease.job.attempt)
        ours.mkdir(parents=True, exist_ok=True)
        before = ours / str(lease.job.attempt - 1)
        if lease.job.attempt > 1 and not before.exists():
            store.blobs.take_over(lease.job.id, before)
        # A rename is quick, and in the fence it excludes an older attempt that only now comes to it.
        with lease.fenced():
            earlier = sorted(ours.iterdir(), key=lambda path: int(path.name))
            if earlier:
                earlier.pop().rename(folder)
            else:
                folder.mkdir()
        fault_point("checkpoint.taken")
        for left in earlier:
            shutil.rmtree(left, ignore_errors=True)
        return cls(folder, store.blobs)

    def share(self) -> None:
        """Let other machines find it as it is now. Raises ObjectStoreUnavailable."""
        self._blobs.hand_over(self.folder.parent.name, self.folder)
        fault_point("checkpoint.shared")

    @contextmanager
    def shared_if_interrupted(self) -> Iterator[None]:
        """Share it when the block cannot be finished by this attempt."""
        try:
            yield
        except AttemptOver:
            try:
                self.share()
            except ObjectStoreUnavailable as error:
                log.warning("%s stays on this machine: %s", self.folder.parent.name, error.detail)
            raise

    def records(self) -> list[str] | None:
        """Ids of the records that training began with; None before it has."""
        try:
            return list(map(str, json.loads((self.folder / _RECORDS).read_text())))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def begin(self, records: Sequence[str]) -> None:
        """Write down what is trained on."""
        aside = self.folder / f"{_RECORDS}.new"
        aside.write_text(json.dumps(list(records)))
        aside.rename(self.folder / _RECORDS)
        fault_point("checkpoint.begun")

    @property
    def answers(self) -> "Answers":
        """What was answered so far."""
        return Answers(self.folder / _ANSWERS)

    def forget(self) -> None:
        """Remove what a training on other records left."""
        shutil.rmtree(self.steps, ignore_errors=True)


class Answers:
    """Texts by what was asked, kept as they come: a line each, of which a kill can tear the last."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = dict(_pairs(file))

    def get(self, asked: str) -> str | None:
        return self._known.get(asked)

    def add(self, asked: str, text: str) -> None:
        self._known[asked] = text
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps([asked, text])}")  # begins a line, whatever was torn before


def drop_ended(store: Store) -> None:
    """Remove what this machine keeps for jobs that have ended or are gone."""
    folder = _folder(store)
    for kept in sorted(folder.iterdir()) if folder.is_dir() else []:
        if _ended(store, kept.name):
            shutil.rmtree(kept, ignore_errors=True)


def drop_handed_over(store: Store) -> None:
    """The same of what was left for other machines."""
    for job_id in store.blobs.handed_over():
        if _ended(store, job_id):
            store.blobs.drop_handed_over(job_id)


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            asked, text = json.loads(line)
        except ValueError:
            continue
        yield asked, text


def _folder(store: Store) -> Path:
    return store.blobs.root / "checkpoints"


def _ended(store: Store, job_id: str) -> bool:
    try:
        return store.jobs.get(job_id).state.final
    except NotFound:
        return True
