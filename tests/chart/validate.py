"""`.venv-chart/bin/python tests/chart/validate.py < objects.yaml`: what is not as the objects' APIs say.

Kubernetes' own kinds against the schemas of the versions 1.27 to 1.36, in which unknown keys are refused;
those of KEDA and of the Prometheus operator against models of their definitions, which drop unknown keys in
silence: what does not come back was unknown.
"""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from referencing import Registry, Resource

VERSIONS = [f"1.{minor}" for minor in range(27, 37)]
OPERATORS = {
    ("keda.sh/v1alpha1", "ScaledObject"): keda.ScaledObject,
    ("keda.sh/v1alpha1", "TriggerAuthentication"): keda.TriggerAuthentication,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): prometheus.ServiceMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): prometheus.PrometheusRule,
}
UNCHECKED = {("gateway.networking.k8s.io/v1", "HTTPRoute"), ("external-secrets.io/v1", "ExternalSecret")}
"""Kinds whose schemas no package brings; the first is compared with the API's keys by a test of its own."""


def unknown(given: Any, known: Any, path: str) -> list[str]:
    """Where `given` has keys that `known` lacks."""
    if isinstance(given, dict) and isinstance(known, dict):
        lacking = [f"{path}.{key}" for key in given.keys() - known.keys()]
        inner = (unknown(given[key], known[key], f"{path}.{key}") for key in given.keys() & known.keys())
        return [*lacking, *(each for found in inner for each in found)]
    if isinstance(given, list) and isinstance(known, list):
        pairs = zip(given, known, strict=True)
        return [each for n, (a, b) in enumerate(pairs) for each in unknown(a, b, f"{path}[{n}]")]
    return []


def of_an_operator(it: dict[str, Any], model: Any) -> list[str]:
    try:
        known = model.model_validate(it).model_dump(mode="json", by_alias=True, exclude_unset=True)
    except ValidationError as error:
        return [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
    return [f"unknown key {each}" for each in unknown(it, known, "")]


def of_a_scaled_job(it: dict[str, Any]) -> list[str]:
    """What it makes is a Job, which Kubernetes' schema knows better: the model chokes on quantities."""
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": it["metadata"],
        "spec": it["spec"]["jobTargetRef"],
    }
    rest = {**it, "spec": {**it["spec"], "jobTargetRef": {"template": {"spec": {"containers": []}}}}}
    return [*of_kubernetes(job), *of_an_operator(rest, keda.ScaledJob)]


@cache
def definitions(version: str) -> Resource[Any]:
    return Resource.from_contents(json.loads((_schemas(version) / "_definitions.json").read_text()))


@cache
def validator(api: str, kind: str, version: str) -> Draft202012Validator:
    """The package's own `validate` reads all definitions anew for each object and takes far longer."""
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api)
    schema = json.loads((_schemas(version) / f"{kind.lower()}-{group}.json").read_text())
    registry = definitions(version) @ (Resource.from_contents(schema) @ Registry())
    return Draft202012Validator(schema, registry=registry)


def _schemas(version: str) -> Path:
    return Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{version}.0-local-strict"


def of_kubernetes(it: dict[str, Any]) -> list[str]:
    return [
        f"{version}: {error.json_path}: {error.message[:200]}"
        for version in VERSIONS
        for error in validator(it["apiVersion"], it["kind"], version).iter_errors(it)
    ]


def problems_of(it: dict[str, Any], kind: tuple[str, str]) -> list[str]:
    if kind[1] == "ScaledJob":
        return of_a_scaled_job(it)
    return of_an_operator(it, OPERATORS[kind]) if kind in OPERATORS else of_kubernetes(it)


def main() -> int:
    objects = {
        json.dumps(each, sort_keys=True): each for each in yaml.load_all(sys.stdin, yaml.CSafeLoader) if each
    }
    found = 0
    for it in objects.values():
        kind = it["apiVersion"], it["kind"]
        if kind in UNCHECKED:
            continue
        problems = problems_of(it, kind)
        for problem in problems:
            print(f"{it['kind']}/{it['metadata']['name']}: {problem}")  # noqa: T201
        found += len(problems)
    print(f"{len(objects)} objects, {found} problems")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
