"""What helm makes of the chart, as Python objects; each set of values is rendered once."""

import json
import subprocess
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
TOOLS = ROOT / ".venv-chart" / "bin"
CI = sorted((CHART / "ci").glob("*.yaml"))
NAMESPACE = "clinic"

INSIDE: dict[str, Any] = {
    "postgres": {"enabled": True},
    "redis": {"enabled": True},
    "objectStore": {"enabled": True},
}
"""The least that renders: nothing outside the cluster."""

BUCKET: dict[str, Any] = {
    "objectStore": {"enabled": False, "url": "s3://one"},
    "networkPolicy": {"objectStore": [{"ipBlock": {"cidr": "10.0.0.9/32"}}]},
}
"""An object store outside instead."""

SHARED: dict[str, Any] = {"objectStore": {"enabled": False}, "state": {"shared": True}}
"""A disk that all pods share instead."""


class Objects:
    """What one rendering contains."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def all(self) -> list[dict[str, Any]]:
        """In the order of the text."""
        return [each for each in yaml.load_all(self.text, yaml.CSafeLoader) if each]

    def kind(self, kind: str) -> dict[str, dict[str, Any]]:
        """By name."""
        return {each["metadata"]["name"]: each for each in self.all if each["kind"] == kind}

    def one(self, kind: str, name: str) -> dict[str, Any]:
        return self.kind(kind)[f"hscr-{name}"]

    def pods(self) -> dict[str, dict[str, Any]]:
        """The spec of every pod, by kind and name of what makes it."""
        return {
            f"{maker['kind']}/{maker['metadata']['name']}": pod["spec"] for maker, pod in self._templates()
        }

    def labels(self) -> dict[str, dict[str, str]]:
        """The labels of every pod, by its component."""
        every = [pod["metadata"]["labels"] for _, pod in self._templates()]
        return {labels["app.kubernetes.io/component"]: labels for labels in every}

    def _templates(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        for each in self.all:
            if each["kind"] == "Pod":
                yield each, each
            elif each["kind"] == "ScaledJob":
                yield each, each["spec"]["jobTargetRef"]["template"]
            elif each["kind"] in {"Deployment", "StatefulSet", "Job"}:
                yield each, each["spec"]["template"]

    def environment(self, pod: dict[str, Any], container: str) -> dict[str, Any]:
        """Variables of a container: plain values as text, others as where they come from."""
        it = next(each for each in pod["containers"] if each["name"] == container)
        found: dict[str, Any] = {}
        for source in it.get("envFrom", []):
            found |= self.kind("ConfigMap")[source["configMapRef"]["name"]]["data"] or {}
        return found | {each["name"]: each.get("value", each.get("valueFrom")) for each in it.get("env", [])}


def helm(*arguments: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm with these values on standard input."""
    given = ["--values", "-"] if values is not None else []
    return subprocess.run(
        [str(TOOLS / "helm"), *arguments, *given],
        input=json.dumps(values or {}),
        capture_output=True,
        text=True,
        check=False,
    )


@cache
def _rendered(values: str, release: str) -> Objects:
    done = helm("template", release, str(CHART), "--namespace", NAMESPACE, values=json.loads(values))
    assert done.returncode == 0, done.stderr
    return Objects(done.stdout)


def render(values: dict[str, Any] | None = None, *, release: str = "hscr") -> Objects:
    """The chart with `values` over what makes it render at all."""
    return _rendered(json.dumps(merged(INSIDE, values or {}), sort_keys=True), release)


def render_ci(path: Path) -> Objects:
    """The chart with one of the ci/ files."""
    return _rendered(json.dumps(yaml.safe_load(path.read_text()), sort_keys=True), "hscr")


def refused(values: dict[str, Any]) -> str:
    """What helm says to values that it must not accept."""
    done = helm("template", "hscr", str(CHART), values=merged(INSIDE, values))
    assert done.returncode != 0, "the values were accepted"
    return done.stderr


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """As helm merges values: sections key by key, everything else replaced."""
    both = dict(one)
    for key, value in other.items():
        inner = both.get(key)
        both[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both
