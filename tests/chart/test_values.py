"""Values: documented, checked, none dead; every setting of every process can be set from them."""

import os
import subprocess
import sys
from typing import Any

import pytest
import yaml

from helm import describe
from service.settings import GatewaySettings
from tests.chart.charts import (
    BUCKET,
    CHART,
    CI,
    ROOT,
    SHARED,
    Objects,
    merged,
    refused,
    render,
    render_ci,
)
from workers.agent import AgentSettings
from workers.settings import WorkerSettings

pytestmark = pytest.mark.chart

ENTRIES = list(describe.values((CHART / "values.yaml").read_text()))
LEAVES = [entry for entry in ENTRIES if not entry.section]
PROCESSES = {"gateway": GatewaySettings, "workers": WorkerSettings, "agent": AgentSettings}
EVERYTHING: dict[str, Any] = {
    "secrets": {"apiKey": "hscr-test"},
    "model": {"existingClaim": "llava-med", "subPath": "hf"},
    "gateway": {
        "ingress": {"enabled": True, "className": "nginx", "tlsSecret": "tls"},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "a"}], "hostnames": ["b.example"]},
        "autoscaling": {"kind": "keda"},
    },
    "engine": {"kind": "vllm", "gpus": 1, "autoscaling": {"kind": "keda"}},
    "workers": {"defaults": {"autoscaling": {"enabled": True}}},
    "monitoring": {"serviceMonitors": True, "engine": True, "rules": True, "dashboards": True},
    "networkPolicy": {
        "database": [{"ipBlock": {"cidr": "10.0.0.1/32"}}],
        "redis": [{"podSelector": {}}],
        "objectStore": [{"podSelector": {}}],
    },
}
IN_BUCKET = merged(
    BUCKET,
    {"objectStore": {"endpoint": "https://one", "region": "one"}, "secrets": {"objectStore": "one"}},
)
SURROUNDINGS: list[dict[str, Any]] = [
    EVERYTHING,
    {},
    IN_BUCKET,
    SHARED,
    {"gateway": {"autoscaling": {"kind": "hpa"}}, "engine": {"autoscaling": {"kind": "hpa"}}},
    OUTSIDE := {
        "postgres": {"enabled": False},
        "redis": {"enabled": False},
        "networkPolicy": {"database": [{"ipBlock": {"cidr": "10.0.0.1/32"}}], "redis": [{"podSelector": {}}]},
    },
]
"""A value need only matter in one of them."""


def others(entry: describe.Value) -> list[Any]:
    """Values of the right type, of which one at least differs from any that is set."""
    if isinstance(entry.default, bool):
        return [False, True]
    return entry.schema.get("enum") or [other(entry)]


def other(entry: describe.Value) -> Any:
    """A value of the right type that differs from the default."""
    if "examples" in entry.schema:
        return entry.schema["examples"][0]
    if "enum" in entry.schema:
        return next(each for each in entry.schema["enum"] if each != entry.default)
    if isinstance(entry.default, bool):
        return not entry.default
    if isinstance(entry.default, int):
        return entry.default + 1 if entry.schema.get("maximum") != entry.default else entry.default - 1
    assert isinstance(entry.default, str), f"{'.'.join(entry.path)} needs an example"
    return f"{entry.default}-other"


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return value


def surroundings(entry: describe.Value) -> list[dict[str, Any]]:
    """Where it can be changed: images and adapters are in one place, and the chart refuses two and none."""
    return {
        ("objectStore", "enabled"): [{}],
        ("objectStore", "url"): [BUCKET],
        ("state", "shared"): [{}],
        ("state", "existingClaim"): [SHARED],
    }.get(entry.path, SURROUNDINGS)


def changes(entry: describe.Value) -> list[dict[str, Any]]:
    if entry.path in {("objectStore", "enabled"), ("state", "shared")}:
        return [SHARED]  # one goes with the other
    return [nested(entry.path, value) for value in others(entry)]


@pytest.mark.parametrize("entry", LEAVES, ids=lambda entry: ".".join(entry.path))
def test_no_value_is_dead(entry: describe.Value) -> None:
    matters = (
        render(merged(around, change)).text != render(around).text
        for around in surroundings(entry)
        for change in changes(entry)
    )
    assert any(matters), "changing it changes nothing"


def test_every_value_is_described() -> None:
    silent = [
        ".".join(entry.path)
        for entry in LEAVES
        if not entry.text
        and "enum" not in entry.schema
        and entry.path[-1] not in {"pod", "enabled", "min", "max"}
    ]
    assert not silent


def test_readme_and_schema_are_made_from_the_values() -> None:
    done = subprocess.run(
        [sys.executable, str(CHART / "describe.py"), "--check"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# -- settings --------------------------------------------------------------------------------------------


def example(facts: dict[str, Any]) -> Any:
    """A valid value of a setting that is not its default."""
    default = facts.get("default")
    if "pattern" in facts:
        return "DEBUG"
    if isinstance(default, bool):
        return not default
    if facts.get("type") == "integer":
        return default - 1 if default + 1 > facts.get("maximum", float("inf")) else default + 1
    if facts.get("type") == "number":
        return default * 1.25 if default else 0.5
    if facts.get("type") == "array":
        return [*default, "ct"]
    return f"{default} It's “quoted”: {{x}}"


OWN = [
    (process, name, facts)
    for process, properties in zip(PROCESSES, describe.PROCESSES.values(), strict=True)
    for name, facts in properties.items()
]


@pytest.fixture(scope="module")
def changed() -> Objects:
    settings: dict[str, dict[str, Any]] = {process: {} for process in PROCESSES}
    for process, name, facts in OWN:
        settings[process][name] = example(facts)
    return render({"settings": settings})


@pytest.mark.parametrize(
    ("process", "name", "facts"), OWN, ids=lambda part: part if isinstance(part, str) else ""
)
def test_every_setting_arrives_as_it_was_given(
    process: str, name: str, facts: dict[str, Any], changed: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    pods = {
        "gateway": ("gateway", "gateway"),
        "workers": ("worker-control", "worker"),
        "agent": ("engine", "agent"),
    }
    deployment, container = pods[process]
    pod = changed.one("Deployment", deployment)["spec"]["template"]["spec"]
    for variable, text in changed.environment(pod, container).items():
        if isinstance(text, str):
            monkeypatch.setenv(variable, text)
    wanted = example(facts)
    arrived = getattr(PROCESSES[process](), name)
    assert (list(arrived) if isinstance(arrived, tuple) else arrived) == wanted
    assert wanted != facts.get("default")


def test_every_setting_has_a_value_or_a_reason() -> None:
    fields = {name for process in PROCESSES.values() for name in process.model_fields}
    named = {name for _, name, _ in OWN}
    assert fields - named - describe.BY_THE_CHART.keys() - describe.FIXED.keys() == set()
    assert describe.BY_THE_CHART.keys() - fields == set()


def test_every_setting_is_described() -> None:
    assert not [f"{process}.{name}" for process, name, facts in OWN if not facts.get("description")]


def test_a_setting_with_a_value_of_its_own_follows_it() -> None:
    values = {".".join(entry.path): entry for entry in LEAVES}
    for name, path in describe.BY_THE_CHART.items():
        around = merged(OUTSIDE, IN_BUCKET)
        change = nested(tuple(path.split(".")), other(values[path]))
        before, after = render(around), render(merged(around, change))
        variable = f"HSCR_{name.upper()}"
        seen = [
            (
                before.environment(pod, each["name"])[variable],
                after.environment(after.pods()[key], each["name"])[variable],
            )
            for key, pod in before.pods().items()
            for each in pod["containers"]
            if variable in before.environment(pod, each["name"])
        ]
        assert seen, name
        assert all(old != new for old, new in seen), name


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"gatway": {}}, "gatway is not allowed"),
        ({"gateway": {"replica": 2}}, "replica is not allowed"),
        ({"gateway": {"replicas": "two"}}, "gateway.replicas: Invalid type. Expected: integer"),
        ({"engine": {"kind": "tgi"}}, "engine.kind must be one of the following"),
        ({"settings": {"gateway": {"max_inflight": 3}}}, "max_inflight is not allowed"),
        ({"settings": {"gateway": {"max_in_flight": 0}}}, "Must be greater than or equal to 1"),
        ({"settings": {"gateway": {"database_url": "postgresql://"}}}, "database_url is not allowed"),
        ({"workers": {"groups": {"gpu": {"queues": ["fine-tune"]}}}}, "must be one of the following"),
        ({"images": {"gateway": {"digest": "sha256:latest"}}}, "Does not match pattern"),
        ({"gateway": {"pod": {"resource": {}}}}, "resource is not allowed"),
        ({"workers": {"groups": {"gpu": {"enabled": False}}}}, 'No worker takes the queue "generate"'),
        ({"workers": {"groups": {"gpu": {"autoscaling": {"jobs": True}}}}}, "needs autoscaling.enabled"),
        ({"engine": {"kind": "vllm"}}, "set model.existingClaim"),
        ({"settings": {"agent": {"adapter_slots": 9}}}, "larger than engine.maxLoras"),
        ({"postgres": {"enabled": False}}, "name it in networkPolicy.database"),
        ({"redis": {"enabled": False}}, "name it in networkPolicy.redis"),
        ({"gateway": {"httpRoute": {"enabled": True}}}, "gateway.httpRoute.parentRefs"),
        ({"objectStore": {"url": "https://minio/hscr"}}, "objectStore.url: Does not match pattern"),
        (
            {"objectStore": {"enabled": False, "url": "s3://hscr"}},
            "name it in networkPolicy.objectStore",
        ),
        ({"objectStore": {"enabled": False}}, "Nothing says where images and adapters are"),
        (merged(BUCKET, {"state": {"existingClaim": "mine"}}), "are places for images and adapters: leave"),
        (merged(BUCKET, {"objectStore": {"enabled": True}}), "are places for images and adapters: leave one"),
        ({"state": {"shared": True}}, "are places for images and adapters: leave one"),
        ({"secrets": {"objectStore": ""}}, "objectStore.enabled needs secrets.objectStore"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_cannot_work_is_refused_and_the_message_names_it(values: dict[str, Any], said: str) -> None:
    assert said in refused(values)


def test_every_ci_file_installs_something_else() -> None:
    texts = [render_ci(path).text for path in CI]
    assert len(CI) == 5
    assert len(set(texts)) == 5


def test_the_version_is_the_code_s() -> None:
    from hscr import __version__

    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__
