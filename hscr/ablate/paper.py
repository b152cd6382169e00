"""The paper's numbers, as the orderings of arms that they state. Source: `paper.toml` beside this file."""

import tomllib
from functools import cache
from importlib.resources import files
from itertools import combinations
from typing import Any, NamedTuple

from hscr.ablate.suites import AblationSuite

METRICS = ("open", "closed")


class Claim(NamedTuple):
    """`better` scores higher than `worse`, on every data set of the paper."""

    metric: str
    better: str
    worse: str


class Mixed(NamedTuple):
    """Two arms that the paper's data sets order differently."""

    metric: str
    arms: tuple[str, str]
    first_wins_on: tuple[str, ...]


def statements(suite: AblationSuite) -> tuple[list[Claim], list[Mixed]]:
    """What the paper says of each pair of the suite's arms that it has; our own controls are not in it."""
    paper = _paper()
    names = [arm.name for arm in suite.arms]
    claims: list[Claim] = []
    mixed: list[Mixed] = []
    for metric in METRICS:
        for pair in combinations([name for name in names if name in paper["scores"]], 2):
            found = _ordered(metric, pair)
            (claims if isinstance(found, Claim) else mixed).append(found)  # type: ignore[arg-type]
    further = [Claim(**claim) for claim in paper["claims"]]
    return claims + [claim for claim in further if {claim.better, claim.worse} <= set(names)], mixed


def _ordered(metric: str, pair: tuple[str, str]) -> Claim | Mixed:
    first, second = (_paper()["scores"][name] for name in pair)
    column = METRICS.index(metric)
    wins = tuple(data for data in first if first[data][column] > second[data][column])
    if len(wins) == len(first):
        return Claim(metric, *pair)
    return Mixed(metric, pair, wins) if wins else Claim(metric, *reversed(pair))


@cache
def _paper() -> dict[str, Any]:
    return tomllib.loads((files("hscr.ablate") / "paper.toml").read_text(encoding="utf-8"))
