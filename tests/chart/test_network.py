"""Who reaches whom: closed by default, with exactly the flows that the processes need."""

from typing import Any

import pytest

from tests.chart.charts import BUCKET, CI, Objects, render, render_ci

pytestmark = pytest.mark.chart


class Network:
    """The policies of one rendering, read as an enforcing network would."""

    def __init__(self, rendered: Objects) -> None:
        self.policies = list(rendered.kind("NetworkPolicy").values())
        self.pods = rendered.labels()

    def flows(self, port: int) -> set[tuple[str, str]]:
        """Pairs of components: the first may open a connection to the second's port, by both sides' rules."""
        return {
            (one, other)
            for one in self.pods
            for other in self.pods
            if self._allowed(one, "Egress", other, port) and self._allowed(other, "Ingress", one, port)
        }

    def outsiders(self, component: str) -> list[dict[str, Any]]:
        """Peers of a component's ingress that are no pods of this namespace."""
        rules = [
            rule for policy in self._of(component, "Ingress") for rule in policy["spec"].get("ingress", [])
        ]
        return [
            peer
            for rule in rules
            for peer in rule["from"]
            if "namespaceSelector" in peer or "ipBlock" in peer
        ]

    def closed(self, component: str) -> bool:
        return bool(self._of(component, "Ingress") and self._of(component, "Egress"))

    def _of(self, component: str, direction: str) -> list[dict[str, Any]]:
        labels = self.pods[component].items()
        return [
            policy
            for policy in self.policies
            if direction in policy["spec"]["policyTypes"]
            and policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels
        ]

    def _allowed(self, component: str, direction: str, peer: str, port: int) -> bool:
        side = "from" if direction == "Ingress" else "to"
        for policy in self._of(component, direction):
            for rule in policy["spec"].get(direction.lower(), []):
                if any(self._is(each, peer) for each in rule[side]) and port in [
                    p["port"] for p in rule["ports"]
                ]:
                    return True
        return False

    def _is(self, selector: dict[str, Any], component: str) -> bool:
        if selector.keys() != {"podSelector"}:
            return False
        return selector["podSelector"].get("matchLabels", {}).items() <= self.pods[component].items()


@pytest.fixture
def network(trial: Objects) -> Network:
    return Network(trial)


def test_nothing_is_open_by_default(installation: Objects) -> None:
    network = Network(installation)
    assert all(network.closed(component) for component in network.pods)
    default = installation.one("NetworkPolicy", "nothing-but-names")["spec"]
    assert "ingress" not in default
    assert {port["port"] for port in default["egress"][0]["ports"]} == {53}


def test_only_gateways_and_workers_that_ask_reach_an_engine(network: Network) -> None:
    assert network.flows(8100) == {
        ("gateway", "engine"), ("worker-control", "engine"), ("worker-gpu", "engine"),
    }  # fmt: skip


def test_workers_that_only_train_or_release_do_not_reach_an_engine() -> None:
    rendered = render_ci(next(path for path in CI if path.stem == "multi-replica-values"))
    assert {one for one, _ in Network(rendered).flows(8100)} == {"gateway", "worker-evaluate", "worker-gpu"}


def test_nobody_outside_reaches_an_engine_unless_its_metrics_are_wanted(trial: Objects, gpu: Objects) -> None:
    assert Network(trial).outsiders("engine") == []
    assert [peer["namespaceSelector"] for peer in Network(gpu).outsiders("engine")] == [
        {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
    ]


def test_the_database_is_reached_by_what_keeps_rows(network: Network) -> None:
    everyone = {"gateway", "engine", "relay", "beat", "migrate", "worker-control", "worker-gpu"}
    assert network.flows(5432) == {(each, "postgres") for each in everyone}


def test_the_queue_is_reached_by_what_sends_or_takes_jobs(network: Network) -> None:
    assert network.flows(6379) == {
        (each, "redis") for each in ("relay", "beat", "worker-control", "worker-gpu")
    }


def test_the_object_store_inside_is_reached_by_what_reads_or_writes_bytes(network: Network) -> None:
    assert network.flows(9000) == {
        (each, "object-store") for each in ("gateway", "engine", "worker-control", "worker-gpu")
    }
    assert network.outsiders("object-store") == []


def test_the_gateway_is_reached_by_its_clients_and_by_helm_s_tests() -> None:
    clients = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}]
    network = Network(render({"networkPolicy": {"clients": clients}}))
    assert network.flows(8080) == {("test", "gateway")}
    assert network.outsiders("gateway") == clients


def test_no_pod_gets_out_of_the_cluster(installation: Objects) -> None:
    for policy in installation.kind("NetworkPolicy").values():
        for rule in policy["spec"].get("egress", []):
            assert rule["to"], "an empty list of peers means everybody"
            blocks = [peer["ipBlock"]["cidr"] for peer in rule["to"] if "ipBlock" in peer]
            assert all(block.endswith("/32") for block in blocks)


def test_services_outside_are_named_by_their_address_and_port(outside: Objects) -> None:
    relay = outside.one("NetworkPolicy", "relay")["spec"]["egress"]
    assert relay == [
        {"to": [{"ipBlock": {"cidr": "10.20.0.5/32"}}], "ports": [{"port": 5432}]},
        {"to": [{"ipBlock": {"cidr": "10.20.0.6/32"}}], "ports": [{"port": 6380}]},
    ]


def test_an_object_store_outside_is_reached_by_what_reads_or_writes_bytes() -> None:
    peers = BUCKET["networkPolicy"]["objectStore"]
    (peer,) = peers

    def leaving(rendered: Objects) -> set[tuple[str, int]]:
        return {
            (policy["metadata"]["labels"]["app.kubernetes.io/component"], port["port"])
            for policy in rendered.kind("NetworkPolicy").values()
            for rule in policy["spec"].get("egress", [])
            if peer in rule["to"]
            for port in rule["ports"]
        }

    assert leaving(render(BUCKET)) == {
        (each, 443) for each in ("gateway", "engine", "worker-control", "worker-gpu")
    }
    assert not leaving(render({"networkPolicy": {"objectStore": peers}}))


def test_policies_can_be_left_to_somebody_else() -> None:
    assert not render({"networkPolicy": {"enabled": False}}).kind("NetworkPolicy")
