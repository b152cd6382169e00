"""checkov's rules for Kubernetes hold, but for these, of which each has its reason and is still needed."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.chart.charts import CI, TOOLS, render_ci

pytestmark = pytest.mark.chart

EXCEPTIONS = {
    "CKV_K8S_8": "liveness: helm's tests end by themselves",
    "CKV_K8S_9": "readiness: workers, relay and beat are sent no traffic",
    "CKV_K8S_11": "CPU limits would throttle a process beside idle ones; memory is limited",
    "CKV_K8S_15": "tags are versions, so a node may keep what it has",
    "CKV_K8S_35": "the in-chart database's URL is made from its password, which only the environment can do",
    "CKV_K8S_40": "PostgreSQL and Valkey run under their images' own numbers",
    "CKV_K8S_43": "images.*.digest takes digests where they were resolved; none is invented here",
}


def test_only_the_exceptions_are_found(tmp_path: Path) -> None:
    for path in CI:
        (tmp_path / path.name).write_text(render_ci(path).text)
    checkov = [str(TOOLS / "checkov"), "--directory", str(tmp_path), "--framework", "kubernetes"]
    done = subprocess.run(
        [*checkov, "--skip-download", "--compact", "--quiet", "--output", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout)
    assert found["summary"]["parsing_errors"] == 0
    assert found["summary"]["resource_count"] > 100
    failed = {f"{each['check_id']} {each['resource']}" for each in found["results"]["failed_checks"]}
    unexplained = {each for each in failed if each.split()[0] not in EXCEPTIONS}
    assert not unexplained
    assert {each.split()[0] for each in failed} == EXCEPTIONS.keys()
