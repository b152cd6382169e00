"""A Kubernetes API server over HTTP, as one identity: objects are what its JSON says."""

import ssl
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import httpx2
import yaml

Object = dict[str, Any]
VERSIONS = {
    "pods": "api/v1", "services": "api/v1", "endpoints": "api/v1",
    "secrets": "api/v1", "configmaps": "api/v1", "nodes": "api/v1", "namespaces": "api/v1",
    "serviceaccounts": "api/v1", "persistentvolumeclaims": "api/v1", "persistentvolumes": "api/v1",
    "deployments": "apis/apps/v1", "jobs": "apis/batch/v1",
    "poddisruptionbudgets": "apis/policy/v1beta1", "horizontalpodautoscalers": "apis/autoscaling/v2beta2",
    "networkpolicies": "apis/networking.k8s.io/v1",
    "roles": "apis/rbac.authorization.k8s.io/v1", "rolebindings": "apis/rbac.authorization.k8s.io/v1",
    "leases": "apis/coordination.k8s.io/v1", "storageclasses": "apis/storage.k8s.io/v1",
    "selfsubjectrulesreviews": "apis/authorization.k8s.io/v1",
    "customresourcedefinitions": "apis/apiextensions.k8s.io/v1",
}  # fmt: skip


class Api:
    """`token` says who asks. Methods that fail raise httpx2.HTTPStatusError with the server's words."""

    def __init__(self, url: str, token: str, certificate: Path) -> None:
        self._url = url
        self._certificate = certificate
        self._known: dict[str, list[Object]] = {}
        self._client = httpx2.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            verify=ssl.create_default_context(cafile=str(certificate)),
            timeout=60,
        )

    def as_bearer(self, token: str) -> Self:
        """The same server for somebody else."""
        return type(self)(self._url, token, self._certificate)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, method: str, path: str, body: Object | None = None, **query: Any) -> httpx2.Response:
        """Whatever the answer is."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        return self._client.request(
            method, path, json=body, params=query, headers={"Content-Type": kind} if body is not None else {}
        )

    def get(self, resource: str, name: str, namespace: str | None = None) -> Object:
        return self._must("GET", path(resource, namespace, name))

    def objects(self, resource: str, namespace: str | None = None, **labels: str) -> list[Object]:
        """`component="gateway"` selects by the chart's labels."""
        chosen = ",".join(f"app.kubernetes.io/{name}={value}" for name, value in labels.items())
        found = self._must("GET", path(resource, namespace), labelSelector=chosen)
        return found["items"]  # type: ignore[no-any-return]

    def create(self, resource: str, it: Object, namespace: str | None = None, **query: Any) -> Object:
        return self._must("POST", path(resource, namespace), it, **query)

    def patch(self, resource: str, name: str, change: Object, namespace: str | None = None) -> Object:
        """`resource` may end in a subresource's name: `pods/x/status` is `"pods", "x/status"`."""
        return self._must("PATCH", path(resource, namespace, name), change)

    def delete(self, resource: str, name: str, namespace: str | None = None) -> Object:
        return self._must("DELETE", path(resource, namespace, name))

    def now(self, resource: str, namespace: str) -> str:
        """The version that the history of these objects has reached."""
        found = self._must("GET", path(resource, namespace))
        return found["metadata"]["resourceVersion"]  # type: ignore[no-any-return]

    def history(self, resource: str, namespace: str, since: str) -> list[tuple[str, Object]]:
        """Every change since then: ADDED, MODIFIED or DELETED, and the object after it."""
        answer = self.ask(
            "GET", path(resource, namespace), watch="true", resourceVersion=since, timeoutSeconds=1
        )
        answer.raise_for_status()
        events = (yaml.safe_load(line) for line in answer.text.splitlines())
        return [(event["type"], event["object"]) for event in events]

    def submit(self, it: Object, namespace: str, **query: Any) -> httpx2.Response:
        """Create an object of any kind; whatever the answer is."""
        group = f"{'apis' if '/' in it['apiVersion'] else 'api'}/{it['apiVersion']}"
        resource = next(each["name"] for each in self._resources(group) if each["kind"] == it["kind"])
        return self.ask("POST", f"/{group}/namespaces/{namespace}/{resource}", it, **query)

    def everything(self, namespace: str) -> set[str]:
        """Resource and name of every object there, but for the events that tell of them."""
        found = set()
        for group in self._groups:
            for resource in (each["name"] for each in self._resources(group) if "list" in each["verbs"]):
                listed = self._must("GET", f"/{group}/namespaces/{namespace}/{resource}")
                found |= {f"{resource}/{it['metadata']['name']}" for it in listed["items"]}
        return {each for each in found if not each.startswith("events/")}

    @cached_property
    def _groups(self) -> list[str]:
        groups = self._must("GET", "/apis")["groups"]
        return ["api/v1", *(f"apis/{group['preferredVersion']['groupVersion']}" for group in groups)]

    def _resources(self, group: str) -> list[Object]:
        """What may be in a namespace."""
        if group not in self._known:
            found = self._must("GET", f"/{group}")["resources"]
            self._known[group] = [it for it in found if it["namespaced"] and "/" not in it["name"]]
        return self._known[group]

    def _must(self, method: str, where: str, body: Object | None = None, **query: Any) -> Object:
        answer = self.ask(method, where, body, **query)
        if answer.is_error:
            message = f"{method} {where}: {answer.status_code} {answer.text}"
            raise httpx2.HTTPStatusError(message, request=answer.request, response=answer)
        return answer.json()  # type: ignore[no-any-return]


def path(resource: str, namespace: str | None = None, name: str | None = None) -> str:
    within = f"namespaces/{namespace}/" if namespace else ""
    return f"/{VERSIONS[resource]}/{within}{resource}" + (f"/{name}" if name else "")
