"""The folder of a run: what it was begun with, which shards are complete, and that one process writes it.

`run.json` is written first and again at the end. A shard is complete when `records/part-NNNNN.parquet` is
there: it was written aside, flushed and renamed. It carries its rows' skips, so a kill loses no other state.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AwareDatetime, BaseModel, ValidationError

from hscr.errors import Conflict
from hscr.parquet import write_text
from hscr.records import now
from hscr.rows.row import Why
from hscr.runs.produce import Skip, Told

RUN, RECORDS, SKIPPED, SUMMARY, PAGE, LOCK = (
    "run.json", "records", "skipped.jsonl", "summary.json", "summary.html", ".lock",
)  # fmt: skip
SKIPS = "hscr.skips"


class _About(BaseModel):
    """What every `run.json` says."""

    started_at: AwareDatetime
    finished_at: AwareDatetime | None
    identity: dict[str, Any]


class RunFolder:
    """Opened by `open_run`, which holds its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: dict[str, Any] = {}

    def begin(self, identity: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Record what the run is made with, or compare with what it was begun with.

        Raises Conflict that names every setting that differs: shards of two settings are no data set. Raises
        Conflict also for a damaged `run.json`.
        """
        (self.path / RECORDS).mkdir(exist_ok=True)
        if not (self.path / RUN).is_file():
            self.about = {"started_at": now().isoformat(), "finished_at": None, "identity": dict(identity)}
            self.save({"environment": dict(environment)})
            return
        self.about = read_about(self.path)
        differences = list(_differences(self.about["identity"], identity))
        if differences:
            raise Conflict(
                f"The run in {self.path} was begun with other settings: {'; '.join(differences)}.",
                remedy="Give the same settings, or a new folder by --out.",
            )

    def save(self, more: Mapping[str, Any]) -> None:
        self.about |= more
        write_text(self.path / RUN, json.dumps(self.about, indent=1, ensure_ascii=False) + "\n")

    @property
    def started_at(self) -> datetime:
        return datetime.fromisoformat(self.about["started_at"])

    def part(self, shard: int) -> Path:
        return self.path / RECORDS / f"part-{shard:05d}.parquet"

    def parts(self) -> list[Path]:
        """Complete shards in order. Raises Conflict when one in the middle is gone."""
        found = sorted((self.path / RECORDS).glob("part-*.parquet"))
        for shard, path in enumerate(found):
            if path != self.part(shard):
                raise Conflict(
                    f"{self.part(shard)} is missing, later shards are there.",
                    remedy="Put it back, or delete the later ones too and resume.",
                )
        return found

    def told(self) -> Told:
        """What the complete shards' rows left behind. Raises Conflict for a damaged shard."""
        skips = list(self.skips())
        ids = {skip.id for skip in skips if skip.why is Why.NO_RECORD and skip.id}
        for part in self.parts():
            with _reading(part):
                ids.update(pq.read_table(part, columns=["source"]).column("source").to_pylist())
        return Told(ids, [])

    def skips(self) -> Iterator[Skip]:
        """In the rows' order. Raises Conflict for a damaged shard."""
        for part in self.parts():
            with _reading(part):
                listed = json.loads((pq.read_metadata(part).metadata or {})[SKIPS.encode()])
            yield from map(Skip.model_validate, listed)


def read_about(folder: Path) -> dict[str, Any]:
    """What a run's `run.json` says. Raises Conflict when it is damaged."""
    text = (folder / RUN).read_bytes()
    try:
        _About.model_validate_json(text)
    except ValidationError as error:
        raise Conflict(
            f"{folder / RUN} is damaged.",
            remedy="Put a whole copy of it back, or generate the records again in a new folder.",
        ) from error
    about: dict[str, Any] = json.loads(text)
    return about


@contextmanager
def open_run(path: Path, *, resume: bool) -> Iterator[RunFolder]:
    """Take the folder for this process; it is made where it does not exist.

    Raises Conflict when it holds something and `resume` is not asked for, holds something that is no run, or
    is being written by another process.
    """
    known = {entry.name for entry in path.iterdir()} - {LOCK} if path.is_dir() else set()
    if known and not resume:
        raise Conflict(
            f"{path} is not empty.", remedy="Name a new folder, or go on with its run by --resume."
        )
    if known and RUN not in known:
        raise Conflict(f"{path} holds no run.", remedy="Name a new folder by --out.")
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"Another process writes {path}.", remedy="Wait for it, or end it.") from error
        yield RunFolder(path)


@contextmanager
def _reading(part: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise Conflict(
            f"{part} cannot be read as a shard of this run.",
            remedy="Delete it and the shards after it, and go on by --resume: they are made again.",
        ) from error


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {_short(old)}, is {_short(new)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}…"
