"""Scraping, alerts and dashboards speak of metrics that exist, and every alert has its page."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from service.metrics import Metrics
from tests.chart.charts import CHART, ROOT, Objects, render

pytestmark = pytest.mark.chart

RUNBOOK = ROOT / "docs" / "runbook.md"


def existing() -> set[str]:
    """Names as Prometheus sees them: the gateway's own, and the engine's that both kinds of engine have."""
    metrics = Metrics()
    metrics.watch_pointer(lambda: 0, lambda: 0)
    names = set()
    for family in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    engine = (ROOT / "service/embedded/metrics.py").read_text()
    return names | set(re.findall(r"vllm:\w+", engine.partition('"""\n')[0]))


def named(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:hscr_|vllm:)\w+", expression))


def rules(rendered: Objects) -> list[dict]:
    return [
        rule for group in rendered.kind("PrometheusRule")["hscr"]["spec"]["groups"] for rule in group["rules"]
    ]


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert shutil.which("promtool"), "promtool is missing: apt install prometheus"
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def rule_file(gpu: Objects, tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(gpu.kind("PrometheusRule")["hscr"]["spec"]))
    return path


def test_prometheus_takes_the_rules(rule_file: Path) -> None:
    done = promtool("check", "rules", "--lint-fatal", str(rule_file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_on_its_trouble_and_not_on_health(rule_file: Path) -> None:
    tests = rule_file.with_name("tests.yaml")
    tests.write_text(
        (Path(__file__).parent / "alerts_test.yaml").read_text().replace("RULES", str(rule_file))
    )
    done = promtool("test", "rules", str(tests))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_put_to_the_test(gpu: Objects) -> None:
    cases = yaml.safe_load((Path(__file__).parent / "alerts_test.yaml").read_text())["tests"]
    fired = {
        each["alertname"] for case in cases for each in case["alert_rule_test"] if each.get("exp_alerts")
    }
    assert fired == {rule["alert"] for rule in rules(gpu)}


def test_every_alert_leads_to_its_section_of_the_runbook(gpu: Objects) -> None:
    anchors = {heading.lower() for heading in re.findall(r"^## (\w+)$", RUNBOOK.read_text(), re.MULTILINE)}
    links = [rule["annotations"]["runbook_url"] for rule in rules(gpu)]
    assert {link.partition("#")[2] for link in links} == anchors
    for rule, link in zip(rules(gpu), links, strict=True):
        assert link == f"docs/runbook.md#{rule['alert'].lower()}"


def test_rules_and_scalers_speak_of_metrics_that_exist(gpu: Objects) -> None:
    triggers = [t for each in gpu.kind("ScaledObject").values() for t in each["spec"]["triggers"]]
    expressions = [rule["expr"] for rule in rules(gpu)]
    expressions += [each["metadata"]["query"] for each in triggers if each["type"] == "prometheus"]
    used = set().union(*map(named, expressions))
    assert used
    assert used <= existing()


def test_dashboards_speak_of_metrics_that_exist(gpu: Objects) -> None:
    boards = {name: each for name, each in gpu.kind("ConfigMap").items() if "-dashboard-" in name}
    assert boards
    for each in boards.values():
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
        (text,) = each["data"].values()
        expressions = [
            target["expr"] for panel in json.loads(text)["panels"] for target in panel.get("targets", [])
        ]
        used = set().union(*map(named, expressions))
        assert used
        assert used <= existing()


def test_the_dashboard_is_the_one_of_docker_compose() -> None:
    board = "dashboards/hscr.json"
    assert (CHART / "files" / board).read_text() == (ROOT / "deploy/grafana" / board).read_text()


def test_a_monitor_finds_the_service_and_its_port(gpu: Objects) -> None:
    for name, monitor in gpu.kind("ServiceMonitor").items():
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        found = [
            each for each in gpu.kind("Service").values() if wanted <= each["metadata"]["labels"].items()
        ]
        assert [each["metadata"]["name"] for each in found] == [name]
        ports = {port["name"] for port in found[0]["spec"]["ports"]}
        assert {each["port"] for each in monitor["spec"]["endpoints"]} <= ports
        assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_the_alert_on_a_stale_pointer_follows_the_setting() -> None:
    rendered = render({"monitoring": {"rules": True}, "settings": {"gateway": {"pointer_stale": 9}}})
    assert next(rule for rule in rules(rendered) if rule["alert"] == "HscrPointerStale")["expr"].endswith(
        "> 9"
    )


def test_nothing_is_watched_unless_asked_for(trial: Objects) -> None:
    assert not {"ServiceMonitor", "PrometheusRule", "ScaledObject"} & {each["kind"] for each in trial.all}
