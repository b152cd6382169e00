"""What scales, by what, and that it never ends a worker that is busy."""

import re
import sqlite3
from datetime import timedelta
from pathlib import Path

import pytest

from hscr.records import Job, JobKind
from hscr.store.store import Store
from tests.chart.charts import CI, Objects, render, render_ci
from workers.contract import QUEUE_OF, QUEUES
from workers.settings import WorkerSettings

pytestmark = pytest.mark.chart


def query(rendered: Objects, group: str) -> str:
    name = f"hscr-worker-{group}"
    scaler = rendered.kind("ScaledObject").get(name) or rendered.kind("ScaledJob")[name]
    return scaler["spec"]["triggers"][0]["metadata"]["query"]


def scaled(queue: str) -> Objects:
    """One group for one queue, scaled, and another for the rest."""
    rest = [each for each in QUEUES if each != queue]
    groups = {"one": {"queues": [queue], "autoscaling": {"enabled": True}}, "control": {"queues": rest}}
    return render({"workers": {"groups": {**groups, "gpu": {"enabled": False}}}})


@pytest.mark.parametrize("queue", QUEUES)
def test_workers_are_counted_by_the_jobs_of_their_queues(queue: str) -> None:
    kinds = set(re.findall(r"'(\w+)'", query(scaled(queue), "one").partition(" AND ")[0]))
    assert kinds == {kind.value for kind, of in QUEUE_OF.items() if of == queue}


def test_the_count_holds_jobs_that_wait_and_jobs_that_run(store: Store, settings, gpu: Objects) -> None:
    """The query of the chart, on the tables as the migrations make them."""

    def counted() -> int:
        with sqlite3.connect(Path(settings.home) / "hscr.db") as database:
            return int(database.execute(query(gpu, "finetune")).fetchone()[0])

    assert counted() == 0
    first, second = (store.jobs.submit(Job(kind=JobKind.FINETUNE, payload={})) for _ in range(2))
    store.jobs.submit(Job(kind=JobKind.RELEASE, payload={}))
    assert counted() == 2
    store.jobs.claim(first.id, owner="worker", lease=timedelta(seconds=30))
    assert counted() == 2, "a job that runs counts as well"
    store.jobs.cancel(second.id)
    assert counted() == 1


def test_workers_are_taken_away_only_when_no_job_is_left(gpu: Objects) -> None:
    for name, each in gpu.kind("ScaledObject").items():
        if "-worker-" in name:
            behaviour = each["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
            assert behaviour["scaleDown"] == {"selectPolicy": "Disabled"}
            assert each["spec"]["minReplicaCount"] == 0
            assert each["spec"]["cooldownPeriod"] > 0
            assert "fallback" not in each["spec"], "with a fallback, a silent database would end workers"


def test_with_jobs_each_job_has_a_pod_that_ends_with_it(gpu: Objects) -> None:
    job = gpu.one("ScaledJob", "worker-finetune")["spec"]
    assert "hscr-worker-finetune" not in gpu.kind("Deployment")
    assert job["rollout"] == {"strategy": "gradual"}, "otherwise an upgrade would end jobs that run"
    assert job["jobTargetRef"]["backoffLimit"] == 0
    pod = job["jobTargetRef"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    waits = float(gpu.environment(pod, "worker")["HSCR_ONE_JOB_SECONDS"])
    assert waits > WorkerSettings().unclaimed_seconds, "a message that was lost is sent again before"
    assert job["triggers"][0]["metadata"]["targetQueryValue"] == "1"


def test_every_scaler_finds_what_it_scales(installation: Objects) -> None:
    for each in (
        *installation.kind("ScaledObject").values(),
        *installation.kind("HorizontalPodAutoscaler").values(),
    ):
        target = installation.kind("Deployment")[each["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in target["spec"], "helm upgrade would undo what was scaled"
        for trigger in each["spec"].get("triggers", []):
            if "authenticationRef" in trigger:
                assert trigger["authenticationRef"]["name"] in installation.kind("TriggerAuthentication")


def test_gateways_scale_by_what_is_in_flight_and_engines_also_by_first_text(gpu: Objects) -> None:
    gateway = gpu.one("ScaledObject", "gateway")["spec"]["triggers"]
    engine = gpu.one("ScaledObject", "engine")["spec"]["triggers"]
    assert ["hscr_in_flight" in each["metadata"]["query"] for each in gateway] == [True]
    assert ["hscr_in_flight" in each["metadata"]["query"] for each in engine] == [True, False]
    assert "hscr_time_to_first_text_seconds_bucket" in engine[1]["metadata"]["query"]


def test_a_fallback_stands_only_beside_metrics_that_keda_allows_it_for(gpu: Objects) -> None:
    for each in gpu.kind("ScaledObject").values():
        kinds = {trigger["metricType"] for trigger in each["spec"]["triggers"]}
        assert "fallback" not in each["spec"] or kinds == {"AverageValue"}


def test_without_keda_hpas_stand_in() -> None:
    rendered = render_ci(next(path for path in CI if path.stem == "multi-replica-values"))
    assert rendered.kind("HorizontalPodAutoscaler").keys() == {"hscr-gateway", "hscr-engine"}
    assert not rendered.kind("ScaledObject")


def test_an_engine_is_taken_away_no_faster_than_it_drains(gpu: Objects) -> None:
    config = gpu.one("ScaledObject", "engine")["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    policy = config["behavior"]["scaleDown"]["policies"][0]
    pod = gpu.one("Deployment", "engine")["spec"]["template"]["spec"]
    assert policy == {"type": "Pods", "value": 1, "periodSeconds": pod["terminationGracePeriodSeconds"]}
