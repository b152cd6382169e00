"""What is known of one arm under one seed, and the folder that keeps it for other suites and later runs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from hscr.ablate.setting import digest
from hscr.errors import Conflict
from hscr.records import PreferenceRecord, Record

Kept = TypeVar("Kept", "Made", "ArmRun")


class Made(Record):
    """Preference records of one seed's questions."""

    identity: dict[str, Any]
    records: tuple[PreferenceRecord, ...]
    skipped: dict[str, int] = Field(description="questions without a record, by reason")


class ArmRun(Record):
    """One arm under one seed, as its held-out answers show it."""

    identity: dict[str, Any] = Field(description="everything that the answers depend on")
    answers: dict[str, str] = Field(description="greedy, by item of the suite")
    dependence: dict[str, float] = Field(description="visual dependence of true answers, nats by item")
    views: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="greedy answers under other pictures, by view and item"
    )
    probability: dict[str, float] = Field(
        default_factory=dict,
        description="by source: mean over its dispreferred answers of their mean token probability under "
        "the base model",
    )
    levels: dict[int, int] = Field(default_factory=dict, description="records by dispreferred answers")
    skipped: dict[str, int] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict, description="of the last epoch of training")
    warnings: tuple[str, ...] = ()
    seconds: float = Field(description="wall clock")

    @property
    def digest(self) -> str:
        return digest(self.identity)

    @property
    def records(self) -> int:
        return sum(self.levels.values())


def file_of(folder: Path, identity: dict[str, Any]) -> Path:
    """Where `folder` keeps what has this identity."""
    return folder / f"{digest(identity)[:24]}.json"


def kept(folder: Path, kind: type[Kept], identity: dict[str, Any], make: Callable[[], Kept]) -> Kept:
    """What `folder` holds under this identity, or else what `make` returns, which is then kept there.

    A file is whole or absent, however a run ends. Raises Conflict when one cannot be read.
    """
    path = file_of(folder, identity)
    if path.is_file():
        try:
            return kind.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise Conflict(
                f"{path} is not what an ablation writes.", remedy="Remove the file; it is made again."
            ) from error
    made = make()
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(made.model_dump_json(), encoding="utf-8")
    aside.replace(path)
    return made
