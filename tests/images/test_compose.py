"""docker-compose.yml's core from built images, on stand-ins of Redis and PostgreSQL: `make test-images`.

The loop once, as on the day somebody installs it: a question, a correction, a preference record, a
fine-tune, a release, and the same question answered by the new version.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hscr.client import Client
from hscr.config import FinetuneConfig, GenerateConfig
from hscr.demo.ward import rounds, traffic
from hscr.models.phantom.anatomy import photograph
from tests.images.compose import ROOT, compose
from tests.images.docker import inspect
from tests.redis_server import free_port
from tests.s3_server import S3Server

pytestmark = [pytest.mark.images, pytest.mark.timeout(1500)]

SERVICES = {
    "gateway", "engine", "agent", "worker", "worker-control", "relay", "beat", "redis", "postgres",
}  # fmt: skip
BRIEF = FinetuneConfig(rank=4, epochs=1)
# Few questions, and a record of most: what the records are worth is not tested here.
GENERATE = GenerateConfig.parse({"substitute": {"negatives": "random"}, "rerank": {"gap": 0.0}})
START_SECONDS = 600


class Deployed:
    """A project of Compose, its port and its secrets; images and adapters in a volume, or in a bucket."""

    def __init__(self, secrets: Path, bucket: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.first_key = (secrets / "hscr_first_key").read_text()
        self.bucket = bucket
        self._environment = {"SECRETS_FOLDER": str(secrets), "GATEWAY_PORT": str(self.port)}
        for name, value in (bucket or {}).items():
            if "access_key" in name:
                (secrets / f"hscr_{name}").write_text(value)
            else:
                self._environment[f"HSCR_{name.upper()}"] = value

    def __call__(self, *arguments: str, seconds: float = 120) -> str:
        more = ["deploy/object-store.yml"] if self.bucket else []
        files = ("docker-compose.yml", *more, "deploy/stand-in/compose.yml")
        named = ("--project-name", "hscr-check", *arguments)
        return compose(*named, files=files, environment=self._environment, seconds=seconds)

    def container(self, service: str) -> Any:
        return inspect("container", self("ps", "--all", "--quiet", service).strip())


@pytest.fixture(scope="module", params=["volume", "bucket"])
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    secrets = tmp_path_factory.mktemp("secrets")
    subprocess.run([ROOT / "deploy" / "secrets.sh", secrets], check=True)
    with ExitStack() as stack:
        bucket = None
        if request.param == "bucket":
            here = inspect("network", "bridge")["IPAM"]["Config"][0]["Gateway"]
            server = S3Server(tmp_path_factory.mktemp("s3"), here).start()
            stack.callback(server.kill)
            bucket = server.bucket()
        project = Deployed(secrets, bucket)
        down = ("--profile", "*", "down", "--volumes", "--timeout", "20")
        stack.callback(project, *down, seconds=300)
        yield project


def made_key(deployed: Deployed, role: str) -> str:
    command = ("keys", "create", "--name", role, "--role", role, "--train-consent", "--json")
    made = deployed("run", "--rm", "--no-TTY", "hscr", *command, seconds=START_SECONDS)
    return str(json.loads(made)["secret"])


@pytest.fixture(scope="module")
def key(deployed: Deployed) -> str:
    """An operator's, made before anything listens; the tables come first."""
    return made_key(deployed, "operator")


@pytest.fixture(scope="module")
def client(deployed: Deployed, key: str) -> Iterator[Client]:
    deployed("up", "--wait", "--wait-timeout", str(START_SECONDS), seconds=START_SECONDS + 60)
    with Client(f"http://127.0.0.1:{deployed.port}", key) as client:
        yield client


@pytest.fixture(scope="module")
def reviewer(deployed: Deployed, client: Client) -> Iterator[Client]:
    """Whose judgements train."""
    with Client(f"http://127.0.0.1:{deployed.port}", made_key(deployed, "reviewer")) as reviewer:
        yield reviewer


def test_everything_turns_healthy(deployed: Deployed, client: Client) -> None:
    assert client.ready()
    for service in SERVICES:
        state = deployed.container(service)["State"]
        assert state["Status"] == "running", service
        assert state["Health"]["Status"] == "healthy", service
    assert deployed.container("migrate")["State"]["ExitCode"] == 0


def test_the_first_key_is_the_one_in_the_secrets(deployed: Deployed, client: Client) -> None:
    with Client(f"http://127.0.0.1:{deployed.port}", deployed.first_key) as operator:
        assert operator.pointer() == client.pointer()


def test_the_password_is_in_no_environment(deployed: Deployed, client: Client) -> None:
    for service in SERVICES:
        assert "postgresql+" not in " ".join(deployed.container(service)["Config"]["Env"]), service


def test_the_loop(client: Client, reviewer: Client) -> None:
    examples = traffic(20, 2, seed=0)
    judged = rounds(client, reviewer, examples, lambda _judged: None)
    assert {each.right for each in judged} == {True, False}, "some answers were corrected"
    before = judged[0].answer
    assert before.provenance.adapter is None

    made = client.wait(client.generate(GENERATE).id)
    records = list(client.preferences())
    assert records, made.result
    right = {each.answer.text if each.right else each.example.answer for each in judged}
    assert {record.chosen for record in records} <= right

    job = client.wait(client.finetune(BRIEF, method="random").id)
    version = str((job.result or {})["adapter"])
    client.wait(client.promote(version, reason="a check of the installation", override=True).id)
    assert client.pointer().active == version
    after = client.ask(photograph(judged[0].example.phantom), judged[0].example.question)
    assert after.provenance.adapter == version


def test_images_and_adapters_are_where_they_were_told_to_be(deployed: Deployed, client: Client) -> None:
    """In a bucket no image is on a disk of ours; rows and bytes belong together in either place."""
    command = ("run", "--rm", "--no-TTY", "hscr", "store", "check", "--json")
    found = json.loads(deployed(*command, seconds=START_SECONDS))
    assert (found["lost_images"], found["lost_adapters"]) == ([], [])
    digest = client.answers()[0].image.digest
    on_disk = deployed("exec", "--no-TTY", "worker", "find", "/data", "-name", digest)
    assert bool(on_disk.strip()) is (deployed.bucket is None)


def test_nothing_is_lost_when_everything_is_started_again(deployed: Deployed, client: Client) -> None:
    before, answers = client.pointer(), len(client.answers())
    deployed("down", "--timeout", "40", seconds=300)
    deployed("up", "--wait", "--wait-timeout", str(START_SECONDS), seconds=START_SECONDS + 60)
    assert client.pointer().active == before.active
    assert len(client.answers()) == answers
    assert client.ready()
