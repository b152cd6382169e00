"""The fault points, read from the source, so that a new one is walked without being listed anywhere."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hscr.records import JobKind

ROOT = Path(__file__).parents[2]
PACKAGES = ("hscr", "service", "workers")
TASKS = ("generate", "finetune", "score", "see")
"""Of the GPU child."""
SUBMITTED = (JobKind.GENERATE, JobKind.FINETUNE, JobKind.SCORE, JobKind.SCORE_ANSWER, JobKind.RELEASE)
"""Over HTTP; only another job submits an evaluation."""

KINDS: dict[str, tuple[str, ...]] = {
    "attempt": tuple(JobKind),
    "child": TASKS,
    "job": tuple(SUBMITTED),
}
"""Who passes a point that is told the kind, by the first part of its name."""


class BadPoint(Exception):
    """A call that cannot be walked."""


class Call(NamedTuple):
    name: str
    kinded: bool
    where: str


def calls(root: Path = ROOT) -> list[Call]:
    """Every call of `fault_point` under the packages. Raises BadPoint for a name that is no literal."""
    files = sorted(file for package in PACKAGES for file in (root / package).rglob("*.py"))
    return [call for file in files for call in _calls(file, root)]


def points(root: Path = ROOT) -> list[str]:
    """What can be armed, in the order of the source. Raises BadPoint for a name that occurs twice."""
    found = calls(root)
    names = [call.name for call in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadPoint(f"{', '.join(twice)}: a fault point's name occurs once")
    return [name for call in found for name in _armable(call)]


def documented() -> dict[str, tuple[str, ...]]:
    """What docs/faults.md says: each point's name and the processes that may die there."""
    page = (ROOT / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| `([\w.-]+)` \| ([\w, -]+) \| .+ \|$", page, re.MULTILINE)
    return {name: tuple(processes.split(", ")) for name, processes in rows}


def _armable(call: Call) -> list[str]:
    if not call.kinded:
        return [call.name]
    return [f"{call.name}.{kind}" for kind in KINDS[call.name.partition(".")[0]]]


def _calls(file: Path, root: Path) -> Iterator[Call]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    made = sorted(
        (node for node in nodes if _names(getattr(node, "func", None))), key=lambda node: node.lineno
    )
    for node in made:
        where = f"{file.relative_to(root)}:{node.lineno}"
        first = node.args[0] if node.args else None
        if not (isinstance(first, ast.Constant) and isinstance(first.value, str)):
            raise BadPoint(f"{where}: a fault point's name is a literal")
        yield Call(first.value, len(node.args) + len(node.keywords) > 1, where)
    if sum(map(_names, nodes)) != len(made):
        raise BadPoint(f"{file.relative_to(root)}: fault_point is called, and nothing else")


def _names(node: ast.AST) -> bool:
    name = getattr(node, "id", None) or getattr(node, "attr", None)
    return name == "fault_point"
