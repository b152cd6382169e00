"""Helm against the test's cluster, with a copy of the chart that this old server can take."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chart.charts import CHART, TOOLS

OLDER = {
    'kubeVersion: ">=1.27.0-0"': 'kubeVersion: ">=1.20.0-0"',
    "apiVersion: policy/v1\n": "apiVersion: policy/v1beta1\n",
    "apiVersion: autoscaling/v2\n": "apiVersion: autoscaling/v2beta2\n",
}
"""What Kubernetes 1.20 lacks, and what it has instead with the same fields."""


def for_this_server(folder: Path) -> Path:
    """The chart in `folder`, with nothing changed but the versions that 1.20 does not know."""
    copy = shutil.copytree(CHART, folder / "hscr")
    replaced = set()
    for file in (copy / "Chart.yaml", *(copy / "templates").glob("*.yaml")):
        text = file.read_text()
        for newer, older in OLDER.items():
            if newer in text:
                text = text.replace(newer, older)
                replaced.add(newer)
        file.write_text(text)
    assert replaced == OLDER.keys(), "the chart no longer has what is replaced"
    return copy


@dataclass(frozen=True)
class Helm:
    """As one user in one namespace."""

    kubeconfig: Path
    namespace: str

    def __call__(self, *arguments: str, values: dict[str, Any] | None = None) -> str:
        """What it prints. Fails with what it complained about."""
        done = self._run(arguments, values)
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def refused(self, *arguments: str, values: dict[str, Any] | None = None) -> str:
        """What it says when it fails, which it must."""
        done = self._run(arguments, values)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def _run(
        self, arguments: tuple[str, ...], values: dict[str, Any] | None
    ) -> subprocess.CompletedProcess[str]:
        given = ["--values", "-"] if values is not None else []
        own = self.kubeconfig.parent / "helm"
        folders = {f"HELM_{name}_HOME": str(own / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        return subprocess.run(
            [
                str(TOOLS / "helm"), "--kubeconfig", str(self.kubeconfig),
                "--namespace", self.namespace, *arguments, *given,
            ],
            input=json.dumps(values or {}), env=os.environ | folders,
            capture_output=True, text=True, check=False, timeout=280,
        )  # fmt: skip
