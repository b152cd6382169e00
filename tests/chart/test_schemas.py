"""Every object is one that the API server of each supported version, and each operator, takes."""

import copy
import subprocess

import pytest
import yaml

from tests.chart.charts import CHART, CI, ROOT, Objects, helm, render_ci

pytestmark = pytest.mark.chart


def validated(objects: list) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / ".venv-chart/bin/python"), str(ROOT / "tests/chart/validate.py")],
        input=yaml.safe_dump_all(objects),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_chart_passes_the_strict_linter() -> None:
    files = [word for path in CI for word in ("--values", str(path))]
    done = helm("lint", "--strict", str(CHART), *files)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_every_object_is_as_its_api_says_from_1_27_to_1_36() -> None:
    done = validated([each for path in CI for each in render_ci(path).all])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_key_or_type_would_be_found(gpu: Objects) -> None:
    deployment = copy.deepcopy(gpu.one("Deployment", "gateway"))
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    scaled = copy.deepcopy(gpu.one("ScaledObject", "gateway"))
    scaled["spec"]["minReplicas"] = 1
    monitor = copy.deepcopy(gpu.one("ServiceMonitor", "gateway"))
    monitor["spec"]["endpoints"][0]["intervals"] = "3s"
    rule = copy.deepcopy(gpu.kind("PrometheusRule")["hscr"])
    rule["spec"]["groups"][0]["rules"][0]["labels"] = "critical"
    done = validated([deployment, scaled, monitor, rule])
    assert done.returncode == 1
    for name in (
        "Deployment/hscr-gateway",
        "ScaledObject/hscr-gateway",
        "ServiceMonitor/",
        "PrometheusRule/",
    ):
        assert name in done.stdout, done.stdout


def test_a_route_of_the_gateway_api_leads_to_the_gateway(outside: Objects) -> None:
    route = outside.kind("HTTPRoute")["hscr"]
    assert route["spec"].keys() == {"parentRefs", "hostnames", "rules"}
    backend = route["spec"]["rules"][0]["backendRefs"][0]
    service = outside.kind("Service")[backend["name"]]
    assert backend["port"] == service["spec"]["ports"][0]["port"]
