"""Each of the chart's ci/ files against a real control plane: taken object by object, then installed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.charts import CI
from tests.cluster.api import Api, Object
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.releases import Helm
from tests.cluster.surroundings import claim, prepare
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", params=CI, ids=lambda path: path.stem)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def values(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def helm(file: Path, values: dict[str, Any], plane: ControlPlane, operator: Api, kubelet: Kubelet) -> Helm:
    """In a namespace with what the file names. Not as a tenant: roles know no operators' kinds."""
    namespace = file.stem
    prepare(operator, namespace)
    for section in ("state", "model"):
        if name := values.get(section, {}).get("existingClaim"):
            operator.create("persistentvolumeclaims", claim(name), namespace)
    return Helm(plane.kubeconfig(), namespace)


def test_the_server_takes_every_object(helm: Helm, file: Path, chart: Path, operator: Api) -> None:
    """Helm's dry run compares them with the server's schemas; the server's own has them pass admission."""
    made = helm("install", "hscr", str(chart), "--values", str(file), "--dry-run=server")
    assert "STATUS: pending-install" in made
    objects = [
        it for it in yaml.safe_load_all(helm("template", "hscr", str(chart), "--values", str(file))) if it
    ]
    assert len(objects) > 20
    for it in objects:
        answer = operator.submit(it, helm.namespace, dryRun="All")
        assert answer.status_code == 201, f"{it['kind']}/{it['metadata']['name']}: {answer.text}"


def test_it_becomes_ready_and_leaves_nothing(
    helm: Helm, file: Path, values: dict[str, Any], chart: Path, operator: Api
) -> None:
    before = operator.everything(helm.namespace)
    helm("install", "hscr", str(chart), "--values", str(file), "--wait", "--timeout", "240s")
    for it in operator.objects("horizontalpodautoscalers", helm.namespace):
        wait_until(
            lambda it=it: replicas(operator, it) >= it["spec"]["minReplicas"], what="the fewest copies"
        )
    wait_until(
        lambda: all(map(available, operator.objects("deployments", helm.namespace))), what="all pods ready"
    )
    helm("uninstall", "hscr", "--wait", "--timeout", "240s")
    kept = set()
    for section, service in (("postgres", "postgres"), ("redis", "redis"), ("objectStore", "object-store")):
        if values.get(section, {}).get("enabled"):
            kept.add(f"persistentvolumeclaims/data-hscr-{service}-0")
    wait_until(
        lambda: operator.everything(helm.namespace) == before | kept, what=f"nothing but {before | kept}"
    )


def replicas(operator: Api, autoscaler: Object) -> int:
    meta, target = autoscaler["metadata"], autoscaler["spec"]["scaleTargetRef"]["name"]
    return operator.get("deployments", target, meta["namespace"])["spec"]["replicas"]  # type: ignore[no-any-return]


def available(deployment: Object) -> bool:
    wanted = deployment["spec"]["replicas"]
    return deployment["status"].get("availableReplicas") == wanted  # type: ignore[no-any-return]
