"""The life of a release on a real control plane: installed, upgraded, broken, rolled back, uninstalled.

No container runs (tests/cluster/kubelet.py): what is shown is what the API server takes and what Kubernetes'
controllers and scheduler make of it. The tests are one story and build on one another.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.chart.charts import CHART
from tests.cluster.api import Api, Object, path
from tests.cluster.kubelet import NODES, NOWHERE, Kubelet
from tests.cluster.releases import Helm
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

VALUES: dict[str, Any] = {
    "postgres": {"enabled": True},
    "redis": {"enabled": True},
    "objectStore": {"enabled": True},
    "secrets": {"apiKey": "hscr-test"},
    "gateway": {"replicas": 3},
}
CHANGED = VALUES | {
    "gateway": {"replicas": 4},
    "settings": {"gateway": {"max_rows": 7}, "workers": {"rollout_seconds": 601}},
}
WAIT = ("--wait", "--timeout", "240s")
KEPT = {f"persistentvolumeclaims/data-hscr-{name}-0" for name in ("postgres", "redis", "object-store")}
"""State and rows, which an uninstallation must not take."""


@pytest.fixture(scope="module")
def before(operator: Api, namespace: str) -> set[str]:
    """What the namespace holds when nothing was ever installed."""
    return operator.everything(namespace)


@pytest.fixture(scope="module")
def installed(helm: Helm, chart: Path, before: set[str]) -> Helm:
    helm("install", "hscr", str(chart), *WAIT, values=VALUES)
    return helm


def deployment(api: Api, namespace: str, name: str) -> Object:
    return api.get("deployments", f"hscr-{name}", namespace)


def names(objects: list[Object]) -> set[str]:
    return {it["metadata"]["name"] for it in objects}


def uids(api: Api, namespace: str, **labels: str) -> set[str]:
    return {pod["metadata"]["uid"] for pod in api.objects("pods", namespace, **labels)}


def fewest_available(api: Api, namespace: str, name: str, since: str) -> int:
    """Ready pods of a Deployment at the worst moment since then."""
    seen = [
        it["status"].get("availableReplicas", 0)
        for _, it in api.history("deployments", namespace, since)
        if it["metadata"]["name"] == f"hscr-{name}"
    ]
    assert seen, f"nothing happened to hscr-{name}"
    return min(seen)


def most_at_once(api: Api, namespace: str, component: str, since: str, *, alive: int) -> int:
    """Pods of a component that existed together since then, `alive` of them to begin with."""
    change = {"ADDED": 1, "MODIFIED": 0, "DELETED": -1}
    most = alive
    for kind, pod in api.history("pods", namespace, since):
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] == component:
            alive += change[kind]
            most = max(most, alive)
    return most


def test_the_chart_as_it_is_refuses_a_server_this_old(helm: Helm) -> None:
    said = helm.refused("install", "hscr", str(CHART), values=VALUES)
    assert "requires kubeVersion: >=1.27.0-0 which is incompatible with Kubernetes v1.20.2" in said


def test_a_tenant_installs_everything_and_it_becomes_ready(
    installed: Helm, operator: Api, namespace: str
) -> None:
    deployments = operator.objects("deployments", namespace)
    assert names(deployments) == {
        f"hscr-{name}" for name in ("gateway", "engine", "relay", "beat", "worker-control", "worker-gpu")
    }
    for it in deployments:
        assert it["status"]["availableReplicas"] == it["spec"]["replicas"], it["metadata"]["name"]
    wait_until(
        lambda: operator.get("jobs", "hscr-migrate-1", namespace)["status"].get("succeeded"),
        what="the migration",
    )


def test_the_scheduler_spreads_the_gateways(installed: Helm, operator: Api, namespace: str) -> None:
    pods = operator.objects("pods", namespace, component="gateway")
    assert len(pods) == 3
    assert {pod["spec"]["nodeName"] for pod in pods} == set(NODES)


def test_services_lead_to_the_pods(installed: Helm, operator: Api, namespace: str) -> None:
    for component, port in (("gateway", 8080), ("engine", 8100), ("postgres", 5432), ("redis", 6379)):
        pods = operator.objects("pods", namespace, component=component)
        (subset,) = operator.get("endpoints", f"hscr-{component}", namespace)["subsets"]
        assert {it["ip"] for it in subset["addresses"]} == {pod["status"]["podIP"] for pod in pods}
        assert [it["port"] for it in subset["ports"]] == [port]


def test_every_policy_chooses_pods_that_exist(installed: Helm, operator: Api, namespace: str) -> None:
    """But for that of helm's tests, whose pods come and go."""
    for it in operator.objects("networkpolicies", namespace):
        if it["metadata"]["name"] != "hscr-test":
            labels = it["spec"]["podSelector"]["matchLabels"]
            chosen = {name.partition("/")[2]: value for name, value in labels.items()}
            assert operator.objects("pods", namespace, **chosen), it["metadata"]["name"]


def test_one_gateway_at_a_time_may_be_evicted(
    installed: Helm, operator: Api, namespace: str, kubelet: Kubelet
) -> None:
    first, second, _ = sorted(names(operator.objects("pods", namespace, component="gateway")))
    wait_until(lambda: budget(operator, namespace)["disruptionsAllowed"] == 1, what="the budget being known")
    with kubelet.starting_nothing():
        assert evict(operator, namespace, first) == 201
        assert evict(operator, namespace, second) == 429
    wait_until(
        lambda: budget(operator, namespace)["currentHealthy"] == 3,
        what="a successor of the one that was evicted",
    )


def budget(api: Api, namespace: str) -> Object:
    return api.get("poddisruptionbudgets", "hscr-gateway", namespace)["status"]  # type: ignore[no-any-return]


def evict(api: Api, namespace: str, name: str) -> int:
    eviction = {"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": {"name": name}}
    return api.ask("POST", path("pods", namespace, f"{name}/eviction"), eviction).status_code


def test_helm_s_tests_run_and_leave_nothing(installed: Helm, operator: Api, namespace: str) -> None:
    said = installed("test", "hscr", "--timeout", "120s")
    assert said.count("Succeeded") == 3
    assert not operator.objects("pods", namespace, component="test")


def test_an_upgrade_replaces_pods_without_taking_one_away(
    installed: Helm, chart: Path, operator: Api, namespace: str
) -> None:
    old = uids(operator, namespace)
    since, pods_since = operator.now("deployments", namespace), operator.now("pods", namespace)
    installed("upgrade", "hscr", str(chart), *WAIT, values=CHANGED)
    settings = operator.get("configmaps", "hscr-gateway-settings", namespace)["data"]
    assert settings["HSCR_MAX_ROWS"] == "7"
    for component, copies in (("gateway", 4), ("engine", 1), ("relay", 1), ("beat", 1)):
        new = uids(operator, namespace, component=component)
        assert len(new) == copies
        assert not new & old, "these read the old settings"
    for component in ("postgres", "redis"):
        assert uids(operator, namespace, component=component) <= old, "nothing had changed for these"
    assert fewest_available(operator, namespace, "gateway", since) >= 3
    assert fewest_available(operator, namespace, "engine", since) >= 1
    assert fewest_available(operator, namespace, "relay", since) >= 1
    assert most_at_once(operator, namespace, "beat", pods_since, alive=1) == 1


def test_an_upgrade_to_images_that_are_nowhere_takes_nothing_away(
    installed: Helm, chart: Path, operator: Api, namespace: str
) -> None:
    since = operator.now("deployments", namespace)
    broken = CHANGED | {"images": {"registry": NOWHERE}}
    said = installed.refused("upgrade", "hscr", str(chart), "--wait", "--timeout", "15s", values=broken)
    assert "timed out" in said or "deadline" in said
    assert fewest_available(operator, namespace, "gateway", since) == 4
    assert fewest_available(operator, namespace, "engine", since) == 1
    assert fewest_available(operator, namespace, "relay", since) == 1


def _settled(operator: Api, namespace: str) -> bool:
    deployments = operator.objects("deployments", namespace)
    return all(it["status"]["availableReplicas"] == it["spec"]["replicas"] for it in deployments)


def test_a_rollback_brings_the_first_release_back(installed: Helm, operator: Api, namespace: str) -> None:
    installed("rollback", "hscr", "1", *WAIT)
    settings = operator.get("configmaps", "hscr-gateway-settings", namespace)
    assert "HSCR_MAX_ROWS" not in settings.get("data", {})
    # Helm waits for what must be there, not for what is one too many to be gone.
    wait_until(lambda: _settled(operator, namespace), what="as many pods as there were")
    assert len(operator.objects("pods", namespace, component="gateway")) == 3
    for pod in operator.objects("pods", namespace):
        assert NOWHERE not in pod["spec"]["containers"][0]["image"]


def test_an_uninstallation_leaves_only_state_and_rows(
    installed: Helm, operator: Api, namespace: str, before: set[str]
) -> None:
    installed("uninstall", "hscr", *WAIT)
    wait_until(
        lambda: operator.everything(namespace) == before | KEPT, what=f"nothing but {sorted(before | KEPT)}"
    )


def test_a_new_installation_finds_the_state_of_the_old_one(
    installed: Helm, chart: Path, operator: Api, namespace: str
) -> None:
    claims = {it["metadata"]["uid"] for it in operator.objects("persistentvolumeclaims", namespace)}
    installed("install", "hscr", str(chart), *WAIT, values=VALUES)
    assert {it["metadata"]["uid"] for it in operator.objects("persistentvolumeclaims", namespace)} == claims
    installed("uninstall", "hscr", *WAIT)


def test_who_wants_nothing_left_deletes_the_claims(
    installed: Helm, operator: Api, namespace: str, before: set[str]
) -> None:
    for it in operator.objects("persistentvolumeclaims", namespace):
        operator.delete("persistentvolumeclaims", it["metadata"]["name"], namespace)
    wait_until(lambda: operator.everything(namespace) == before, what="nothing but what was there before")
    wait_until(lambda: namespace not in owners(operator), what="no volume of theirs being left")


def owners(api: Api) -> set[str]:
    """Namespaces of the claims that have volumes."""
    return {it["spec"]["claimRef"]["namespace"] for it in api.objects("persistentvolumes")}
