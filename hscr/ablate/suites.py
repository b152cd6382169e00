"""Which arms each of the paper's tables compares, and what all of them share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import reduce
from typing import Any, Literal

from hscr.config import LoopConfig
from hscr.errors import InvalidConfig
from hscr.recipes import merged


class SuiteName(StrEnum):
    MASK = "mask"
    SOURCE = "source"
    LEVELS = "levels"
    RATE = "rate"


@dataclass(frozen=True)
class Arm:
    """One way to align the base model: the shared configuration with `changes`, keys as `section.key`.

    `negatives` says who writes the dispreferred answers: the model itself, or somebody else (`external`).
    An arm that is not `trained` is the base model.
    """

    name: str
    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    negatives: Literal["self", "external"] = "self"
    trained: bool = True

    def config(self, shared: LoopConfig) -> LoopConfig:
        """Raises InvalidConfig where the shared configuration has no place for the change."""
        values: Mapping[str, Any] = shared.resolved()
        for key, value in self.changes.items():
            change: Any = value
            for part in reversed(key.split(".")):
                change = {part: change}
            values = merged(values, change)
        return LoopConfig.parse(dict(values))


@dataclass(frozen=True)
class AblationSuite:
    name: SuiteName
    title: str
    table: str
    """of the paper"""
    arms: tuple[Arm, ...]

    def require_defaults(self, shared: LoopConfig) -> None:
        """The arm `hscr` is the shared configuration, and its label says what HSCR does in this table.

        Raises InvalidConfig where the shared configuration says otherwise in a key that the arms vary.
        """
        for key in sorted({key for arm in self.arms for key in arm.changes}):
            given, default = _value(shared, key), _value(LoopConfig(), key)
            if given != default:
                raise InvalidConfig(
                    f"{key}: the configuration says {given}, where HSCR has {default}.",
                    remedy=f"Leave it out: the suite {self.name} varies it.",
                )


def _value(config: LoopConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


BASE = Arm("base", "base model", trained=False)
HSCR = "hscr"
"""Name of the arm that all others are compared with, in each table."""
EXTERNAL = "external"

_KIND, _RATE = "generate.degrade.kind", "generate.degrade.rate"


def _rate(rate: float) -> Arm:
    return Arm(f"rate-{rate}", f"{rate:.0%} dropped", {_RATE: rate})


_SUITES = (
    AblationSuite(
        SuiteName.MASK,
        "what is dropped",
        "Table 5",
        (
            BASE,
            Arm("pixel", "pixels (crop)", {_KIND: "pixel"}),
            Arm("patch", "patches before the vision tower", {_KIND: "patch"}),
            Arm("latent", "attention in the vision tower", {_KIND: "latent"}),
            Arm(HSCR, "visual tokens (HSCR)"),
        ),
    ),
    AblationSuite(
        SuiteName.SOURCE,
        "who writes the dispreferred answers",
        "Table 3",
        (
            BASE,
            Arm(EXTERNAL, "somebody else, by the grammar", negatives="external"),
            Arm("random", "chance (control)", {"generate.substitute.negatives": "random"}),
            Arm(HSCR, "the model itself (HSCR)"),
        ),
    ),
    AblationSuite(
        SuiteName.LEVELS,
        "which preferences are trained on",
        "Table 4",
        (
            BASE,
            Arm("sft", "none: SFT (control)", {"finetune.objective": "sft"}),
            Arm("explicit", "explicit only", {"finetune.implicit_weight": 0.0}),
            Arm("implicit", "implicit only", {"finetune.explicit_weight": 0.0}),
            Arm(HSCR, "explicit and implicit (HSCR)"),
        ),
    ),
    AblationSuite(
        SuiteName.RATE,
        "how much is dropped",
        "Table 6",
        (BASE, _rate(0.3), _rate(0.5), Arm(HSCR, "70% dropped (HSCR)"), _rate(0.9)),
    ),
)
SUITES = {suite.name: suite for suite in _SUITES}
