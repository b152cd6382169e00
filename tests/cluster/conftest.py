"""One cluster for all tests, and a namespace with what the chart wants to find for each file of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.api import Api
from tests.cluster.control_plane import CACHE, ControlPlane, control_plane
from tests.cluster.kubelet import Kubelet, open_to_pods
from tests.cluster.releases import Helm, for_this_server
from tests.cluster.surroundings import furnish, prepare, remove_folders
from tests.waiting import wait_until


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    assert (CACHE / "bin").exists(), "there is no control plane yet: make test-cluster builds it"
    with control_plane(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="session")
def operator(plane: ControlPlane) -> Iterator[Api]:
    """May do everything."""
    with plane.api() as api:
        yield api


@pytest.fixture(scope="session")
def kubelet(plane: ControlPlane, operator: Api) -> Iterator[Kubelet]:
    """Nodes that pods can be scheduled to, a class of storage, and the operators' kinds."""
    furnish(operator)
    with plane.api() as api, Kubelet(api) as nodes:
        wait_until(
            lambda: all(map(open_to_pods, operator.objects("nodes"))), what="the nodes counting as ready"
        )
        yield nodes
        remove_folders(operator)


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return for_this_server(tmp_path_factory.mktemp("chart"))


@pytest.fixture(scope="module")
def namespace(request: pytest.FixtureRequest, operator: Api, kubelet: Kubelet) -> str:
    """With its Secrets, for a tenant who may do there what the role `admin` may, and nothing elsewhere."""
    name = request.module.__name__.rpartition(".")[2].removeprefix("test_").replace("_", "-")
    prepare(operator, name)
    return name


@pytest.fixture(scope="module")
def helm(plane: ControlPlane, namespace: str) -> Helm:
    return Helm(plane.kubeconfig("tenant"), namespace)
