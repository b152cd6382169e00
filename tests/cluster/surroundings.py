"""What the chart expects to find in a cluster and in its namespace."""

import re
from pathlib import Path

from tests.cluster.api import Api, Object
from tests.waiting import wait_until

SECRETS = {
    "hscr": [
        "postgres-password",
        "study-secret",
        "database-url",
        "redis-url",
        "keda-connection",
        "access-key-id",
        "secret-access-key",
    ],
    "hscr-bucket": ["access-key-id", "secret-access-key"],
    "hscr-database": ["database-url"],
    "hscr-first-key": ["api-key"],
    "hscr-redis": ["redis-url"],
    "hscr-study": ["study-secret"],
    "hscr-test": ["api-key"],
    "platform-ca": ["ca.crt"],
}
"""What ci/ files and docs tell to make before the installation, by name, with its keys."""

OPERATORS = {
    "keda.sh/v1alpha1": ["ScaledObject", "ScaledJob", "TriggerAuthentication"],
    "monitoring.coreos.com/v1": ["ServiceMonitor", "PrometheusRule"],
    "gateway.networking.k8s.io/v1": ["HTTPRoute"],
    "external-secrets.io/v1": ["ExternalSecret"],
}
"""Kinds that operators bring, here without a schema: `make test-chart` checks what is in them."""


def furnish(operator: Api) -> None:
    """A class of storage whose volumes are folders, and the operators' kinds."""
    default = {"storageclass.kubernetes.io/is-default-class": "true"}
    metadata = {"name": "folders", "annotations": default}
    operator.create("storageclasses", {"metadata": metadata, "provisioner": "kubernetes.io/host-path"})
    for version, kinds in OPERATORS.items():
        for kind in kinds:
            operator.create("customresourcedefinitions", definition(version, kind))


def remove_folders(operator: Api) -> None:
    """Those of the volumes that are left; nobody wrote into them."""
    for it in operator.objects("persistentvolumes"):
        Path(it["spec"]["hostPath"]["path"]).rmdir()


def prepare(operator: Api, namespace: str) -> None:
    """A namespace as the documentation wants it before `helm install`."""
    operator.create("namespaces", {"metadata": {"name": namespace}})
    for name, keys in SECRETS.items():
        operator.create(
            "secrets", {"metadata": {"name": name}, "stringData": dict.fromkeys(keys, "x")}, namespace
        )
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "admin"}
    tenants = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "tenants"}
    binding = {"metadata": {"name": "tenants"}, "roleRef": role, "subjects": [tenants]}
    operator.create("rolebindings", binding, namespace)
    wait_until(lambda: populated(operator, namespace), what="the controllers having seen the namespace")


def populated(operator: Api, namespace: str) -> bool:
    """With what Kubernetes itself puts into every namespace."""
    accounts = operator.objects("serviceaccounts", namespace)
    authorities = operator.objects("configmaps", namespace)
    return bool(authorities and accounts and accounts[0].get("secrets"))


def claim(name: str) -> Object:
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    return {"metadata": {"name": name}, "spec": spec}


def definition(version: str, kind: str) -> Object:
    """Any object of that kind is taken."""
    group, _, name = version.partition("/")
    plural = re.sub("y$", "ie", kind.lower()) + "s"
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    served = {"name": name, "served": True, "storage": True, "schema": {"openAPIV3Schema": anything}}
    return {
        # Groups below k8s.io are open only to kinds whose interface was approved.
        "metadata": {
            "name": f"{plural}.{group}",
            "annotations": {"api-approved.kubernetes.io": "unapproved, test"},
        },
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural},
            "versions": [served],
        },
    }
