"""`python helm/describe.py [--check]`: makes README.md and values.schema.json from values.yaml.

A comment above a value is its description; `# @schema {...}` adds to what its default tells of its type. What
the processes read from the environment is taken from their own settings classes, so that names, types and
bounds exist once.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic_settings import BaseSettings

from service.settings import GatewaySettings
from workers.agent import AgentSettings
from workers.settings import WorkerSettings

HERE = Path(__file__).parent

BY_THE_CHART = {
    "home": "state.mountPath",
    "database_url": "secrets.database",
    "redis_url": "secrets.redis",
    "blobs_url": "objectStore.url",
    "s3_endpoint": "objectStore.endpoint",
    "s3_region": "objectStore.region",
    "s3_access_key_id": "secrets.objectStore",
    "s3_secret_access_key": "secrets.objectStore",
    "host": "gateway.host",
    "port": "gateway.port",
    "request_deadline": "gateway.requestDeadlineSeconds",
    "drain_grace": "gateway.requestDeadlineSeconds",
    "study_secret": "secrets.study",
    "model_path": "model.existingClaim",
    "device": "compute.device",
    "dtype": "compute.dtype",
    "torch_threads": "compute.threads",
    "engine_url": "engine.port",
}
"""Settings that have a value of their own."""

FIXED = {
    "replica_id": "the pod's name",
    "health_file": "a file that the probes read",
    "one_job_seconds": "180 where autoscaling.jobs makes a pod for each job",
    "ready_file": "a file that the agent's readiness probe reads",
}
"""Settings that the chart needs to be as they are."""


class Value(NamedTuple):
    """One entry of values.yaml. A section has no schema of its own."""

    path: tuple[str, ...]
    default: Any
    text: str
    schema: dict[str, Any]
    section: bool


def own_settings(process: type[BaseSettings], *, without: type[BaseSettings] | None = None) -> dict[str, Any]:
    """The JSON schema of each setting that is given by its own name."""
    inherited = set() if without is None else without.model_fields
    properties = process.model_json_schema()["properties"]
    return {
        name: {key: fact for key, fact in properties[name].items() if key != "title"}
        for name in process.model_fields
        if name not in BY_THE_CHART and name not in FIXED and name not in inherited
    }


PROCESSES = {
    "gatewaySettings": own_settings(GatewaySettings),
    "workerSettings": own_settings(WorkerSettings),
    "agentSettings": own_settings(AgentSettings, without=WorkerSettings),
}

_RESOURCES = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        side: {"type": "object", "additionalProperties": {"type": ["string", "integer", "number"]}}
        for side in ("requests", "limits")
    },
}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_POD = {
    "resources": {"$ref": "#/$defs/resources", "description": "of the component's own container"},
    "nodeSelector": _TEXTS | {"description": "labels of the nodes"},
    "tolerations": {"type": "array", "items": {"type": "object"}, "description": "of taints, as in the API"},
    "affinity": {"type": "object", "description": "as in the API"},
    "priorityClassName": {"type": "string", "description": "of the pod"},
    "runtimeClassName": {"type": "string", "description": "of the pod"},
    "labels": _TEXTS | {"description": "further ones of the pod"},
    "annotations": _TEXTS | {"description": "further ones of the pod"},
    "env": _TEXTS | {"description": "further variables of the component's container"},
}
_QUEUES = ["control", "evaluate", "generate", "score", "finetune"]
_GROUP = {
    "enabled": {"type": "boolean", "description": "whether it is there"},
    "image": {"enum": ["gateway", "worker"], "description": "worker for generate, score and finetune"},
    "queues": {
        "type": "array",
        "minItems": 1,
        "uniqueItems": True,
        "items": {"enum": _QUEUES},
        "description": "what it takes",
    },
    "replicas": {"type": "integer", "minimum": 0, "description": "pods, where nothing scales them"},
    "concurrency": {"type": "integer", "minimum": 1, "description": "jobs of a pod at once; 1 with a GPU"},
    "gpus": {"type": "integer", "minimum": 0, "description": "of a pod"},
    "graceSeconds": {"type": "integer", "minimum": 30, "description": "to hand a job back after SIGTERM"},
    "autoscaling": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "enabled": {"type": "boolean"},
            "jobs": {"type": "boolean"},
            "max": {"type": "integer", "minimum": 1},
            "cooldownSeconds": {"type": "integer", "minimum": 0},
        },
        "description": "by KEDA, up to max, by jobs that wait or run; down only to none, or, with jobs, "
        "a pod for each job that ends with it (a ScaledJob)",
    },
    "pod": {"$ref": "#/$defs/pod", "description": "see below"},
}
_IMAGE = {
    "repository": {"type": "string", "minLength": 1},
    "tag": {"type": "string"},
    "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
}


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


DEFINITIONS = {
    "image": _closed(_IMAGE),
    "resources": _RESOURCES,
    "pod": _closed(_POD),
    "workerGroup": _closed(_GROUP),
    "workerGroups": {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z][a-z0-9-]{0,15}$"},
        "additionalProperties": {"$ref": "#/$defs/workerGroup"},
    },
    **{name: _closed(properties) for name, properties in PROCESSES.items()},
}


def values(text: str) -> Iterator[Value]:
    """The entries of values.yaml in their order; what a `$ref` describes is one entry."""
    tree = yaml.safe_load(text)
    comment: list[str] = []
    path: list[str] = []
    inside: int | None = None
    for line in text.splitlines():
        at = len(line) - len(line.lstrip())
        key = re.match(r" *([A-Za-z]\w*):", line)
        if inside is not None and line.strip() and at > inside:
            continue
        if line.lstrip().startswith("# "):
            comment.append(line.strip()[2:])
        elif key is None:
            comment = []
        else:
            path = [*path[: at // 2], key[1]]
            default = tree
            for name in path:
                default = default[name]
            schema = json.loads(
                "".join(c.removeprefix("@schema ") for c in comment if c.startswith("@")) or "{}"
            )
            section = isinstance(default, dict) and not schema
            words = " ".join(c for c in comment if not c.startswith("@"))
            yield Value(tuple(path), default, words, schema, section)
            inside = None if section else at
            comment = []


_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def schema(entries: list[Value]) -> dict[str, Any]:
    """Draft 7, in which no unknown key is allowed."""
    root = _closed({"global": {"type": "object"}})
    for value in entries:
        at = root
        for name in value.path[:-1]:
            at = at["properties"][name]
        described = {"description": value.text} if value.text else {}
        if value.section:
            at["properties"][value.path[-1]] = _closed({}) | described
        elif "$ref" in value.schema:
            at["properties"][value.path[-1]] = {"$ref": value.schema["$ref"]}
        else:
            own = {key: fact for key, fact in value.schema.items() if key != "examples"}
            at["properties"][value.path[-1]] = {"type": _TYPES[type(value.default)], **own} | described
    return {"$schema": "http://json-schema.org/draft-07/schema#", **root, "$defs": DEFINITIONS}


def readme(entries: list[Value]) -> str:
    lines = [
        "# The Helm chart",
        "",
        "The whole system in a namespace of Kubernetes 1.27 or newer, by Helm 3.17 or newer. Made by",
        "`helm/describe.py` from `helm/values.yaml` and the processes' settings: change those. How to",
        "install it: [docs/deploy-kubernetes.md](../docs/deploy-kubernetes.md).",
        "",
        "## Values",
        "",
        "| value | default | |",
        "|---|---|---|",
    ]
    for value in entries:
        shown = "" if value.section else f"`{json.dumps(value.default)}`"
        lines.append(
            f"| `{'.'.join(value.path)}` | {_cell(shown)} | {_cell(value.text + _choices(value.schema))} |"
        )
    lines += _table("## Of a pod: `pods` and every `pod`", _POD)
    lines += _table("## Of a worker group: `workers.defaults` and each of `workers.groups`", _GROUP)
    for process, properties in zip(("gateway", "workers", "agent"), PROCESSES.values(), strict=True):
        lines += _table(f"## Settings: `settings.{process}`", properties)
    lines += ["", "## Settings that have a value of their own, or none", "", "| setting | |", "|---|---|"]
    lines += [f"| `HSCR_{name.upper()}` | `{path}` |" for name, path in BY_THE_CHART.items()]
    lines += [f"| `HSCR_{name.upper()}` | {why} |" for name, why in FIXED.items()]
    return "\n".join(lines) + "\n"


def _table(title: str, properties: dict[str, Any]) -> list[str]:
    rows = [
        f"| `{name}` | {_cell('`' + json.dumps(facts['default']) + '`') if 'default' in facts else ''} "
        f"| {_cell(facts.get('description', '') + _choices(facts))} |"
        for name, facts in properties.items()
    ]
    return ["", title, "", "| name | default | |", "|---|---|---|", *rows]


def _choices(facts: dict[str, Any]) -> str:
    return f" One of {', '.join(map(str, facts['enum']))}." if "enum" in facts else ""


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|")


def made() -> dict[Path, str]:
    """What the two files must contain."""
    entries = list(values((HERE / "values.yaml").read_text()))
    return {
        HERE / "README.md": readme(entries),
        HERE / "values.schema.json": json.dumps(schema(entries), indent=1, ensure_ascii=False) + "\n",
    }


def main() -> int:
    stale = [path for path, text in made().items() if not path.exists() or path.read_text() != text]
    if "--check" not in sys.argv[1:]:
        for path in stale:
            path.write_text(made()[path])
    elif stale:
        print("Out of date:", *(path.name for path in stale), "– run `python helm/describe.py`.")  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
