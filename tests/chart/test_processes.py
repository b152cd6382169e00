"""Gateway, engine, agent, workers, relay, beat and migrations, as the code wants to be started."""

import itertools
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import pytest

from hscr.errors import ObjectStoreUnavailable
from hscr.records import Role
from hscr.serving import Serving
from hscr.store.blobs import open_blobs
from hscr.store.database import Database
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from tests.chart.charts import BUCKET, CHART, SHARED, Objects, merged, refused, render
from tests.redis_server import free_port
from tests.s3_server import RCLONE
from tests.waiting import wait_until
from workers.contract import QUEUES

pytestmark = pytest.mark.chart
BESIDE = Path(sys.executable).parent


def spec(rendered: Objects, name: str) -> dict[str, Any]:
    return next(pod for key, pod in rendered.pods().items() if key.endswith(f"/hscr-{name}"))


def container(rendered: Objects, name: str, which: str | None = None) -> dict[str, Any]:
    return next(each for each in spec(rendered, name)["containers"] if which in {None, each["name"]})


# -- gateway ---------------------------------------------------------------------------------------------


def test_a_gateway_outlives_its_longest_stream() -> None:
    rendered = render({"gateway": {"requestDeadlineSeconds": 300, "settleSeconds": 15}})
    pod = spec(rendered, "gateway")
    environment = rendered.environment(pod, "gateway")
    assert environment["HSCR_REQUEST_DEADLINE"] == "300"
    drain = int(environment["HSCR_DRAIN_GRACE"])
    assert drain > 300
    assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "15"]
    assert pod["terminationGracePeriodSeconds"] > 15 + drain


def test_a_rollout_of_gateways_takes_none_away_before_another_is_ready(trial: Objects) -> None:
    strategy = trial.one("Deployment", "gateway")["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    probes = container(trial, "gateway")
    assert probes["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert probes["livenessProbe"]["httpGet"]["path"] == "/livez"


def test_the_probed_paths_are_routes_of_the_gateway(trial: Objects) -> None:
    from service.routes.health import router

    routes = {route.path for route in router.routes}
    probes = container(trial, "gateway")
    assert {
        probes[each]["httpGet"]["path"] for each in ("startupProbe", "livenessProbe", "readinessProbe")
    } <= routes


def test_a_gateway_waits_for_tables_and_for_a_first_key(trial: Objects, tmp_path: Path) -> None:
    """The script of the chart, run."""
    script = spec(trial, "gateway")["initContainers"][0]["args"][0]
    path = f"{BESIDE}:{os.environ['PATH']}"
    surroundings = {**os.environ, "HSCR_HOME": str(tmp_path), "PATH": path}
    with subprocess.Popen(["sh", "-c", script], env=surroundings, stdout=subprocess.PIPE, text=True) as wait:
        assert wait.stdout is not None
        says(wait.stdout, "waiting for tables of this version and for a first key")
        database = Database(StoreSettings(home=tmp_path).database)
        database.upgrade()
        database.close()
        says(wait.stdout, "The database has revision")
        says(wait.stdout, "waiting for tables of this version and for a first key")
        with Store.open(StoreSettings(home=tmp_path)) as store:
            store.keys.create("me", Role.OPERATOR)
        wait.stdout.read()
        assert wait.wait(60) == 0


def says(output: IO[str], what: str) -> None:
    """Read on to a line that begins so."""
    assert next((line for line in output if line.startswith(what)), None), f"it ended before it said: {what}"


def test_only_gateways_wait_for_a_key(trial: Objects) -> None:
    for name in ("engine", "relay", "beat", "worker-control", "worker-gpu"):
        script = spec(trial, name)["initContainers"][0]["args"][0]
        assert "hscr db check" in script
        assert "hscr keys" not in script


def test_copies_are_spread_and_disrupted_one_by_one(installation: Objects) -> None:
    for name in ("gateway", "engine"):
        keys = {each["topologyKey"] for each in spec(installation, name)["topologySpreadConstraints"]}
        assert keys == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
        budget = installation.one("PodDisruptionBudget", name)["spec"]
        assert budget["maxUnavailable"] == 1


def test_the_ingress_ends_tls_where_a_certificate_is_given(gpu: Objects) -> None:
    ingress = gpu.kind("Ingress")["hscr"]["spec"]
    assert ingress["tls"] == [{"hosts": ["vqa.hospital.example"], "secretName": "hscr-tls"}]
    backend = ingress["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend["name"] in gpu.kind("Service")
    assert "tls" not in render({"gateway": {"ingress": {"enabled": True}}}).kind("Ingress")["hscr"]["spec"]


# -- engine and agent ------------------------------------------------------------------------------------


def test_vllm_is_started_as_the_launcher_starts_it(gpu: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSCR_VLLM_COMMAND", sys.executable)
    monkeypatch.setenv("HSCR_VLLM_ARGUMENTS", "--gpu-memory-utilization 0.9")
    serving = Serving(Path("/models/base"), "base", 8100, host="0.0.0.0", device="cuda", dtype="bfloat16")
    command = serving.command("vllm")
    engine = container(gpu, "engine", "engine")
    assert engine["command"] == ["vllm", "serve"]
    assert engine["args"] == list(command.arguments[1:])
    assert command.environment.items() <= gpu.environment(spec(gpu, "engine"), "engine").items()


def test_the_embedded_engine_is_started_as_the_launcher_starts_it(trial: Objects) -> None:
    serving = Serving(Path("/models/phantom"), "base", 8100, host="0.0.0.0")
    engine = container(trial, "engine", "engine")
    assert engine["command"] == ["python", "-m", "service.embedded"]
    launched = list(serving.command("embedded").arguments[3:])
    assert engine["args"][: len(launched)] == launched
    assert engine["args"][len(launched) :] == ["--grace", "120"]


def test_agent_and_workers_compute_as_the_engine_does(gpu: Objects) -> None:
    for name, which in (("engine", "agent"), ("worker-gpu", "worker"), ("worker-finetune", "worker")):
        environment = gpu.environment(spec(gpu, name), which)
        assert environment["HSCR_DEVICE"] == "cuda"
        assert environment["HSCR_DTYPE"] == "bfloat16"
        assert environment["HSCR_MODEL_PATH"] == "/models/base"
        mounts = {mount["mountPath"]: mount for mount in container(gpu, name, which)["volumeMounts"]}
        assert mounts["/models/base"]["readOnly"] is True


def test_the_agent_reports_an_address_that_others_reach(trial: Objects) -> None:
    environment = trial.environment(spec(trial, "engine"), "agent")
    assert environment["HSCR_ENGINE_URL"] == "http://$(POD_IP):8100"
    assert environment["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert environment["HSCR_REPLICA_ID"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    order = [each["name"] for each in container(trial, "engine", "agent")["env"]]
    assert order.index("POD_IP") < order.index("HSCR_ENGINE_URL")


def test_an_engine_is_ready_when_its_agent_has_loaded_what_serves(trial: Objects) -> None:
    agent = container(trial, "engine", "agent")
    file = trial.environment(spec(trial, "engine"), "agent")["HSCR_READY_FILE"]
    assert agent["readinessProbe"]["exec"]["command"] == ["test", "-e", file]
    service = trial.one("Service", "engine")["spec"]
    assert service["publishNotReadyAddresses"] is True
    assert service["clusterIP"] == "None"


def test_the_engine_sees_a_shared_state_and_its_model_read_only() -> None:
    rendered = render(merged(SHARED, {"model": {"existingClaim": "mine"}}))
    for which in ("engine", "agent"):
        mounts = {mount["name"]: mount for mount in container(rendered, "engine", which)["volumeMounts"]}
        assert mounts["state"]["readOnly"] is True
        assert mounts["model"]["readOnly"] is True


def test_an_agent_brings_adapters_from_an_object_store_to_where_its_engine_reads_them(
    outside: Objects,
) -> None:
    engine, agent = (
        next(mount for mount in each["volumeMounts"] if mount["name"] == "state")
        for each in spec(outside, "engine")["containers"]
    )
    assert engine["mountPath"] == agent["mountPath"]
    assert outside.environment(spec(outside, "engine"), "agent")["HSCR_HOME"] == agent["mountPath"]
    assert (engine["readOnly"], agent["readOnly"]) == (True, False)


def test_an_engine_outlives_its_longest_answer() -> None:
    rendered = render({"gateway": {"requestDeadlineSeconds": 300, "settleSeconds": 15}})
    command = container(rendered, "engine", "engine")["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:2] == ["python3", "/hscr/drain.py"]
    assert command[3:] == ["15", "300"]
    assert spec(rendered, "engine")["terminationGracePeriodSeconds"] > 15 + 300


def test_an_engine_of_one_gpu_can_be_replaced_in_its_place() -> None:
    rendered = render({"engine": {"strategy": "Recreate"}})
    assert rendered.one("Deployment", "engine")["spec"]["strategy"] == {"type": "Recreate"}


class Metrics:
    """A server of /metrics that says what it is told; counts how often it was asked."""

    def __init__(self) -> None:
        self.running = 1
        self.asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                text = (
                    f'vllm:num_requests_running{{model_name="base"}} {outer.running}.0\n'
                    'vllm:num_requests_waiting{model_name="base"} 0.0\n'
                )
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/metrics"

    def __enter__(self) -> "Metrics":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def drain(url: str, deadline: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(CHART / "files/drain.py"), url, "0", deadline])


def test_draining_waits_for_the_last_answer() -> None:
    with Metrics() as metrics, drain(metrics.url, "60") as waiting:
        wait_until(lambda: metrics.asked > 1, what="the second look")
        assert waiting.poll() is None
        metrics.running = 0
        assert waiting.wait(30) == 0


def test_draining_gives_up_at_its_deadline_and_where_nothing_answers() -> None:
    with Metrics() as metrics, drain(metrics.url, "0.6") as waiting:
        assert waiting.wait(30) == 0
        assert metrics.running == 1
    with drain(metrics.url, "600") as waiting:
        assert waiting.wait(30) == 0


def test_the_names_that_draining_counts_are_the_engine_s() -> None:
    pattern = (CHART / "files/drain.py").read_text()
    exposed = (Path(CHART).parent / "service/embedded/metrics.py").read_text()
    assert "vllm:num_requests_(?:running|waiting)" in pattern
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting"} <= set(re.findall(r"vllm:\w+", exposed))


# -- workers ---------------------------------------------------------------------------------------------


def workers(rendered: Objects) -> list[dict[str, Any]]:
    return [pod for key, pod in rendered.pods().items() if "/hscr-worker-" in key]


def taken(rendered: Objects) -> list[str]:
    commands = [pod["containers"][0]["command"] for pod in workers(rendered)]
    return list(itertools.chain(*(command[command.index("-Q") + 1].split(",") for command in commands)))


def test_every_queue_is_taken_once(installation: Objects) -> None:
    assert sorted(taken(installation)) == sorted(QUEUES)


@pytest.mark.parametrize("queue", QUEUES)
def test_a_queue_that_nobody_takes_is_refused(queue: str) -> None:
    queues = [each for each in QUEUES if each != queue]
    groups = {"control": {"queues": queues}, "gpu": {"queues": [queues[0]]}}
    assert f'No worker takes the queue "{queue}"' in refused({"workers": {"groups": groups}})


def test_workers_without_torch_run_the_small_image(trial: Objects) -> None:
    assert container(trial, "worker-control")["image"].startswith("hscr-gateway:")
    assert container(trial, "worker-gpu")["image"].startswith("hscr-worker:")
    assert "--concurrency=1" in container(trial, "worker-gpu")["command"]


def test_a_gpu_is_asked_for_where_one_is_needed(gpu: Objects) -> None:
    for name, which in (("engine", "engine"), ("worker-gpu", "worker"), ("worker-finetune", "worker")):
        assert container(gpu, name, which)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in container(gpu, "worker-control")["resources"]["limits"]


def test_a_worker_has_time_to_hand_its_job_back(installation: Objects) -> None:
    from workers.settings import WorkerSettings

    for pod in workers(installation):
        assert pod["terminationGracePeriodSeconds"] > WorkerSettings().lease_seconds


def test_there_is_exactly_one_beat(installation: Objects) -> None:
    beat = installation.one("Deployment", "beat")["spec"]
    assert beat["replicas"] == 1
    assert beat["strategy"] == {"type": "Recreate"}


def test_what_serves_no_port_is_watched_by_the_file_it_touches(trial: Objects) -> None:
    for name, which in (
        ("worker-gpu", "worker"),
        ("worker-control", "worker"),
        ("relay", "relay"),
        ("beat", "beat"),
        ("engine", "agent"),
    ):
        file = trial.environment(spec(trial, name), which)["HSCR_HEALTH_FILE"]
        probe = container(trial, name, which)["livenessProbe"]
        assert probe["exec"]["command"] == ["python", "-m", "hscr.healthcheck", file]
        patience = probe["periodSeconds"] * probe["failureThreshold"]
        assert patience >= 600, "an outage of queue or database must not end a worker at its job"


# -- migrations ------------------------------------------------------------------------------------------


def test_an_external_database_is_migrated_before_anything_else(outside: Objects) -> None:
    job = outside.one("Job", "migrate")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    pod = job["spec"]["template"]["spec"]
    assert "hscr db upgrade" in pod["containers"][0]["command"][-1]
    # Nothing of the chart exists yet when the hook runs: only what a person made before.
    assert "serviceAccountName" not in pod
    assert "envFrom" not in pod["containers"][0]
    (tmp, *given) = pod["volumes"]
    assert tmp.keys() == {"name", "emptyDir"}
    assert {each["secret"]["secretName"] for each in given} == {"hscr-first-key", "platform-ca"}


def test_a_first_key_is_made_with_the_tables_and_only_once(tmp_path: Path) -> None:
    """The command of the chart, run twice."""
    rendered = render({"secrets": {"firstKey": "mine"}})
    (migrate,) = spec(rendered, "migrate-1")["containers"]
    mount = next(each for each in migrate["volumeMounts"] if each["name"] == "first-key")
    volume = next(each for each in spec(rendered, "migrate-1")["volumes"] if each["name"] == "first-key")
    assert volume["secret"]["items"] == [{"key": "api-key", "path": "api-key"}]
    secret = f"hscr_sk_{'0' * 64}"
    (tmp_path / "api-key").write_text(secret)
    shell, option, script = migrate["command"]
    script = script.replace(mount["mountPath"], str(tmp_path))
    path = f"{BESIDE}:{os.environ['PATH']}"
    surroundings = {**os.environ, "HSCR_HOME": str(tmp_path / "home"), "PATH": path}
    for _ in range(2):
        subprocess.run([shell, option, script], env=surroundings, check=True)
    with Store.open(StoreSettings(home=tmp_path / "home")) as store:
        (key,) = store.keys.page()
        assert key.role is Role.OPERATOR
        assert store.keys.verify(secret) == key


def test_a_database_inside_is_migrated_beside_and_waited_for(trial: Objects) -> None:
    job = trial.one("Job", "migrate-1")
    assert "annotations" not in job["metadata"]
    assert spec(trial, "migrate-1")["containers"][0]["command"] == ["hscr", "db", "upgrade"]
    for name in ("gateway", "engine", "relay", "beat", "worker-control", "worker-gpu"):
        assert "hscr db check" in spec(trial, name)["initContainers"][0]["args"][0]


def test_a_rollback_replaces_a_store_that_cannot_start(trial: Objects) -> None:
    """In the default order the controller waits for it instead, as `make test-cluster` found."""
    sets = trial.kind("StatefulSet")
    assert sets.keys() == {"hscr-postgres", "hscr-redis", "hscr-object-store"}
    for it in sets.values():
        assert it["spec"]["podManagementPolicy"] == "Parallel"


def test_the_database_s_address_is_made_from_its_password_or_comes_from_a_secret(
    trial: Objects, outside: Objects
) -> None:
    inside = trial.environment(spec(trial, "gateway"), "gateway")
    assert (
        inside["HSCR_DATABASE_URL"]
        == "postgresql+psycopg://hscr:$(POSTGRES_PASSWORD)@hscr-postgres:5432/hscr"
    )
    order = [each["name"] for each in container(trial, "gateway")["env"]]
    assert order.index("POSTGRES_PASSWORD") < order.index("HSCR_DATABASE_URL")
    given = outside.environment(spec(outside, "gateway"), "gateway")
    assert given["HSCR_DATABASE_URL"] == {"secretKeyRef": {"name": "hscr-database", "key": "database-url"}}
    assert not outside.kind("StatefulSet")


def test_whoever_reaches_an_outside_database_or_queue_has_the_ca_that_signed_them(outside: Objects) -> None:
    asked = 0
    for name, pod in outside.pods().items():
        for each in [*pod["containers"], *pod.get("initContainers", [])]:
            if any(variable["name"] == "HSCR_DATABASE_URL" for variable in each.get("env", [])):
                mounts = {mount["mountPath"]: mount for mount in each["volumeMounts"]}
                assert mounts["/etc/hscr/ca"]["readOnly"] is True, name
                (volume,) = [v for v in pod["volumes"] if v["name"] == mounts["/etc/hscr/ca"]["name"]]
                assert volume["secret"]["secretName"] == "platform-ca"
                asked += 1
    assert asked == 13, "every process of ours, and what waits before it"


BYTES = {
    "gateway": "gateway",
    "engine": "agent",
    "worker-control": "worker",
    "worker-gpu": "worker",
}
"""Who reads or writes images and adapters: the container by its pod."""


def test_what_reads_or_writes_bytes_knows_the_bucket_and_has_its_keys_from_a_secret(outside: Objects) -> None:
    for name, which in BYTES.items():
        environment = outside.environment(spec(outside, name), which)
        key = {"secretKeyRef": {"name": "hscr-bucket", "key": "access-key-id"}}
        secret = {"secretKeyRef": {"name": "hscr-bucket", "key": "secret-access-key"}}
        assert environment["HSCR_BLOBS_URL"] == "s3://hscr/ward"
        assert environment["HSCR_S3_ENDPOINT"] == "https://s3.hospital.example:9000"
        assert environment["HSCR_S3_REGION"] == "us-east-1"
        assert environment["HSCR_S3_ACCESS_KEY_ID"] == key
        assert environment["HSCR_S3_SECRET_ACCESS_KEY"] == secret
        assert environment["SSL_CERT_FILE"] == "/etc/hscr/ca/ca.crt"


def test_what_needs_rows_only_can_start_without_the_bucket_s_secret(outside: Objects) -> None:
    """The migration above all: the Secret may come with the installation, as from a vault."""
    knowing = {
        each["name"]
        for pod in outside.pods().values()
        for each in [*pod["containers"], *pod.get("initContainers", [])]
        if any(variable["name"] == "HSCR_BLOBS_URL" for variable in each.get("env", []))
    }
    assert knowing == set(BYTES.values())


def test_the_ca_of_others_is_not_the_only_one_that_aws_is_trusted_by() -> None:
    aws = render(merged(BUCKET, {"tls": {"existingCaSecret": "platform-ca"}}))
    assert "SSL_CERT_FILE" not in aws.text


def test_without_an_object_store_nothing_of_one_is_said() -> None:
    shared = render(merged(SHARED, {"tls": {"existingCaSecret": "platform-ca"}}))
    assert not re.search("HSCR_BLOBS_URL|HSCR_S3_|SSL_CERT_FILE|rclone", shared.text)


def test_the_object_store_inside_opens_to_those_who_have_its_key(
    trial: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the chart, run, and asked with what the chart gives to a gateway."""
    (tmp_path / "hscr").mkdir()
    it, port = container(trial, "object-store"), free_port()
    (claim,) = (mount for mount in it["volumeMounts"] if mount["name"] == "data")
    folder, _, bucket = claim["mountPath"].rpartition("/")
    here = {":9000": f"127.0.0.1:{port}", folder: str(tmp_path), "rclone": str(RCLONE)}
    secrets = {"access-key-id": "trial-key", "secret-access-key": "0123abc"}
    served = from_secrets(trial.environment(spec(trial, "object-store"), "object-store"), secrets)
    given = from_secrets(trial.environment(spec(trial, "gateway"), "gateway"), secrets)
    assert given["HSCR_S3_ENDPOINT"] == "http://hscr-object-store:9000"
    (service,) = trial.one("Service", "object-store")["spec"]["ports"]
    assert (service["port"], it["ports"][0]["containerPort"]) == (9000, 9000)
    given |= {"HSCR_S3_ENDPOINT": f"http://127.0.0.1:{port}", "HSCR_HOME": str(tmp_path / "home")}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with subprocess.Popen([here.get(word, word) for word in it["command"]], env=served) as server:
        blobs = open_blobs(StoreSettings())
        digest = blobs.put(b"pixels")  # it asks again until the server is there
        assert blobs.get(digest) == b"pixels"
        assert list((tmp_path / bucket).rglob(digest)), "on the claim"
        monkeypatch.setenv("HSCR_S3_SECRET_ACCESS_KEY", "somebody's")
        with pytest.raises(ObjectStoreUnavailable):
            open_blobs(StoreSettings()).get(digest)
        server.terminate()


def from_secrets(environment: dict[str, Any], secrets: dict[str, str]) -> dict[str, str]:
    """As a kubelet makes it: secrets read, $(NAME) replaced; what is in no secret here is left out."""
    made: dict[str, str] = {}
    for name, value in environment.items():
        if isinstance(value, str):
            made[name] = re.sub(r"\$\((\w+)\)", lambda found: made.get(found[1], found[0]), value)
        elif (key := value.get("secretKeyRef", {}).get("key")) in secrets:
            made[name] = secrets[key]
    return made


def test_without_a_ca_none_is_mounted(trial: Objects) -> None:
    assert "/etc/hscr" not in trial.text
