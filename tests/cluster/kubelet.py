"""Two nodes on which no container runs: what a kubelet reports, and what keeps it from starting a pod.

A pod that was scheduled runs and is ready at once, one that is to end (a Job's) has succeeded, one that is
deleted is gone. As on a real node, nothing of a pod starts while a Secret, a ConfigMap or a key that it names
is missing, or while its image cannot be pulled.
"""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import count
from typing import Any, Self

from tests.cluster.api import Api, Object, path

NODES = ("node-1", "node-2")
ZONES = {"node-1": "zone-a", "node-2": "zone-b"}
CAPACITY = {"cpu": "64", "memory": "512Gi", "pods": "110", "nvidia.com/gpu": "8"}
NOWHERE = "nowhere.invalid"
"""A registry from which no image can be pulled."""


class Kubelet:
    """Both nodes, by `with`. An error of its own is raised when it is stopped."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._addresses = count(1)
        self._stopped = threading.Event()
        self._starts = threading.Event()
        self._starts.set()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        for name in NODES:
            self._register(name)
        self._work = self._thread.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._work.result()
        self._thread.shutdown()

    @contextlib.contextmanager
    def starting_nothing(self) -> Iterator[None]:
        """Pods still end meanwhile."""
        self._starts.clear()
        try:
            yield
        finally:
            self._starts.set()

    def _run(self) -> None:
        while not self._stopped.wait(0.2):
            self._renew()
            held = self._contents()
            for pod in self._api.objects("pods"):
                if pod["spec"].get("nodeName"):
                    self._tend(pod, held)

    def _tend(self, pod: Object, held: dict[str, set[str]]) -> None:
        phase = pod["status"]["phase"]
        if "deletionTimestamp" in pod["metadata"]:
            self._end(pod)
        elif phase == "Pending" and self._starts.is_set():
            problem = obstacle(pod, held)
            if problem is None:
                self._report(pod, running(pod, f"10.244.0.{next(self._addresses)}"))
            elif problem != pod["status"].get("message"):
                self._report(pod, {"phase": "Pending", "message": problem})
        elif phase == "Running" and pod["spec"]["restartPolicy"] != "Always":
            self._report(pod, succeeded(pod))

    def _contents(self) -> dict[str, set[str]]:
        """The keys of every Secret and ConfigMap."""
        return {
            f"{resource}/{it['metadata']['namespace']}/{it['metadata']['name']}": set(it.get("data") or {})
            for resource in ("secrets", "configmaps")
            for it in self._api.objects(resource)
        }

    def _end(self, pod: Object) -> None:
        at_once = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        self._unless_gone("DELETE", pod, "", at_once)

    def _report(self, pod: Object, status: Object) -> None:
        self._unless_gone("PATCH", pod, "/status", {"status": status})

    def _unless_gone(self, method: str, pod: Object, subresource: str, body: Object) -> None:
        meta = pod["metadata"]
        answer = self._api.ask(method, path("pods", meta["namespace"], meta["name"] + subresource), body)
        if answer.status_code not in {404, 409}:
            answer.raise_for_status()

    def _register(self, name: str) -> None:
        labels = {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": ZONES[name]}
        self._api.create("nodes", {"metadata": {"name": name, "labels": labels}})
        ready = {"type": "Ready", "status": "True", "reason": "Fake", "lastHeartbeatTime": now()}
        status = {
            "capacity": CAPACITY,
            "allocatable": CAPACITY,
            "conditions": [ready],
            "addresses": [{"type": "InternalIP", "address": f"10.0.0.{NODES.index(name) + 1}"}],
        }
        self._api.patch("nodes", f"{name}/status", {"status": status})
        lease = {"metadata": {"name": name}, "spec": {"holderIdentity": name, "leaseDurationSeconds": 40}}
        self._api.create("leases", lease, "kube-node-lease")

    def _renew(self) -> None:
        for name in NODES:
            self._api.patch("leases", name, {"spec": {"renewTime": now(micro=True)}}, "kube-node-lease")


def obstacle(pod: Object, held: dict[str, set[str]]) -> str | None:
    """What keeps this pod from starting, in words."""
    for container in containers(pod):
        if container["image"].startswith(NOWHERE):
            return f"ErrImagePull: {container['image']}"
    for resource, name, key in references(pod):
        keys = held.get(f"{resource}/{pod['metadata']['namespace']}/{name}")
        if keys is None or (key and key not in keys):
            return f"CreateContainerConfigError: {resource}/{name} {key} not found"
    return None


def references(pod: Object) -> Iterator[tuple[str, str, str]]:
    """Resource, name and key (or nothing) of what the pod cannot start without."""
    for container in containers(pod):
        for source in container.get("envFrom", []):
            yield "configmaps", source["configMapRef"]["name"], ""
        for variable in container.get("env", []):
            for kind, resource in (("secretKeyRef", "secrets"), ("configMapKeyRef", "configmaps")):
                if reference := variable.get("valueFrom", {}).get(kind):
                    yield resource, reference["name"], reference["key"]
    for volume in pod["spec"].get("volumes", []):
        if "configMap" in volume:
            yield "configmaps", volume["configMap"]["name"], ""
        if "secret" in volume:
            yield "secrets", volume["secret"]["secretName"], ""


def open_to_pods(node: Object) -> bool:
    return not node["spec"].get("taints")


def running(pod: Object, address: str) -> Object:
    state = {"running": {"startedAt": now()}}
    ended = {"terminated": {"exitCode": 0, "reason": "Completed"}}
    return {
        "phase": "Running",
        "message": None,
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": now(),
        "conditions": [
            {"type": kind, "status": "True", "lastTransitionTime": now()}
            for kind in ("Initialized", "Ready", "ContainersReady", "PodScheduled")
        ],
        "initContainerStatuses": [of(each, ended) for each in pod["spec"].get("initContainers", [])],
        "containerStatuses": [of(each, state) for each in pod["spec"]["containers"]],
    }


def succeeded(pod: Object) -> Object:
    ended = {"terminated": {"exitCode": 0, "reason": "Completed"}}
    return {
        "phase": "Succeeded",
        "containerStatuses": [of(each, ended) for each in pod["spec"]["containers"]],
    }


def of(container: Object, state: Object) -> dict[str, Any]:
    image = {"image": container["image"], "imageID": "", "restartCount": 0}
    return {"name": container["name"], "ready": True, "state": state, **image}


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def now(*, micro: bool = False) -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ" if micro else "%Y-%m-%dT%H:%M:%SZ")
