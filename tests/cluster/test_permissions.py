"""On a real control plane: a release's service account may do nothing, and its pods hold no token."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.api import Api, Object, path
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import containers
from tests.cluster.releases import Helm

pytestmark = pytest.mark.cluster

READS = ("pods", "secrets", "configmaps", "services", "deployments", "serviceaccounts", "jobs")


@pytest.fixture(scope="module")
def installed(helm: Helm, chart: Path) -> Helm:
    values = {"postgres": {"enabled": True}, "redis": {"enabled": True}, "objectStore": {"enabled": True}}
    helm("install", "hscr", str(chart), "--wait", "--timeout", "240s", values=values)
    return helm


@pytest.fixture(scope="module")
def stolen(installed: Helm, operator: Api, namespace: str) -> Iterator[Api]:
    """The API as one who got hold of a token of the release's service account."""
    with operator.as_bearer(token(operator, namespace, "hscr")) as api:
        yield api


def token(operator: Api, namespace: str, account: str) -> str:
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    made = operator.ask("POST", path("serviceaccounts", namespace, f"{account}/token"), request)
    return made.json()["status"]["token"]  # type: ignore[no-any-return]


def test_the_account_is_known_and_reads_nothing(stolen: Api, namespace: str) -> None:
    for resource in READS:
        answer = stolen.ask("GET", path(resource, namespace))
        assert answer.status_code == 403, resource
        message = answer.json()["message"]
        assert f'"system:serviceaccount:{namespace}:hscr" cannot list resource "{resource}"' in message
    assert stolen.ask("GET", path("secrets", namespace, "hscr")).status_code == 403
    for resource in ("nodes", "namespaces", "persistentvolumes"):
        assert stolen.ask("GET", path(resource)).status_code == 403, resource


def test_the_account_writes_nothing(stolen: Api, operator: Api, namespace: str) -> None:
    made = {"metadata": {"name": "mine"}}
    assert stolen.ask("POST", path("configmaps", namespace), made).status_code == 403
    assert stolen.ask("DELETE", path("deployments", namespace, "hscr-gateway")).status_code == 403
    pod = operator.objects("pods", namespace, component="gateway")[0]["metadata"]["name"]
    assert stolen.ask("POST", path("pods", namespace, f"{pod}/exec"), {}).status_code == 403


def test_the_account_may_only_look_after_itself(stolen: Api, namespace: str) -> None:
    """The server's own list: what everybody who has a name may do."""
    review = {"spec": {"namespace": namespace}}
    rules = stolen.create("selfsubjectrulesreviews", review)["status"]["resourceRules"]
    assert {each for rule in rules for each in rule["resources"]} == {
        "selfsubjectaccessreviews", "selfsubjectrulesreviews",
    }  # fmt: skip


def test_a_permission_would_have_been_seen(stolen: Api, operator: Api, namespace: str) -> None:
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"}
    account = {"kind": "ServiceAccount", "name": "other", "namespace": namespace}
    operator.create("serviceaccounts", {"metadata": {"name": "other"}}, namespace)
    binding = {"metadata": {"name": "other"}, "roleRef": role, "subjects": [account]}
    operator.create("rolebindings", binding, namespace)
    with operator.as_bearer(token(operator, namespace, "other")) as other:
        assert other.ask("GET", path("pods", namespace)).status_code == 200
    assert stolen.ask("GET", path("pods", namespace)).status_code == 403


def test_no_pod_holds_a_token(installed: Helm, operator: Api, namespace: str) -> None:
    """As the server admitted them; to a pod that says nothing it adds one."""
    pods = operator.objects("pods", namespace)
    components = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods}
    assert components >= {"gateway", "engine", "relay", "beat", "migrate", "worker-gpu", "postgres", "redis"}
    for pod in pods:
        assert not token_mounts(pod), pod["metadata"]["name"]
    plain = {"metadata": {"name": "plain"}, "spec": {"containers": [{"name": "it", "image": "it"}]}}
    assert token_mounts(operator.create("pods", plain, namespace, dryRun="All"))


def token_mounts(pod: Object) -> list[str]:
    """Where its containers find a token of the cluster's API."""
    mounts = [mount for each in containers(pod) for mount in each.get("volumeMounts", [])]
    return [it["mountPath"] for it in mounts if it["mountPath"].startswith("/var/run/secrets/kubernetes.io")]


def test_the_release_brings_no_role(installed: Helm, operator: Api, namespace: str) -> None:
    assert not operator.objects("roles", namespace)
    bound = {it["metadata"]["name"] for it in operator.objects("rolebindings", namespace)}
    assert bound <= {"tenants", "other"}


def test_who_installs_needs_nothing_beyond_the_namespace(
    installed: Helm, plane: ControlPlane, namespace: str
) -> None:
    with plane.api("tenant") as tenant:
        assert tenant.ask("GET", path("pods", namespace)).status_code == 200
        assert tenant.ask("GET", path("pods", "kube-system")).status_code == 403
        assert tenant.ask("GET", path("nodes")).status_code == 403
