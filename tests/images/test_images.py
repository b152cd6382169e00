"""The built images, each as it is and in a container: `make test-images`."""

from collections.abc import Iterator

import pytest

from hscr import __version__
from tests.images.docker import CONFINED, docker, image, inspect, python, run
from tests.waiting import wait_until

pytestmark = pytest.mark.images

GATEWAY_LIMIT_BYTES = 300_000_000
UNWANTED = ["gcc", "cc", "g++", "c++", "ld", "as", "make", "cmake", "pip", "pip3", "git", "curl", "wget"]
WHAT_CAN_BE_FOUND = f"""
import json, shutil, importlib.util as packages
print(json.dumps({{
    "programs": [name for name in {UNWANTED} if shutil.which(name)],
    "packages": [name for name in ("pip", "torch", "celery", "uvicorn") if packages.find_spec(name)],
}}))
"""
WHAT_CAN_BE_WRITTEN = """
import json, os
found = []
for folder, below, files in os.walk("/"):
    if folder in ("/proc", "/sys", "/dev", "/tmp", "/data"):
        below.clear()
        continue
    found += [folder] * os.access(folder, os.W_OK)
    found += [path for name in files if os.access(path := os.path.join(folder, name), os.W_OK)]
print(json.dumps(found))
"""


@pytest.fixture(params=["gateway", "worker", "engine"])
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_it_says_what_it_is(target: str) -> None:
    config = inspect("image", image(target))["Config"]
    labels = {name.rpartition(".")[2]: text for name, text in config["Labels"].items()}
    assert labels["title"] == f"hscr-{target}"
    assert labels["version"] == __version__
    assert labels["licenses"] == "Apache-2.0"
    assert "Research use only" in labels["description"]
    assert len(labels["revision"].partition("-")[0]) == 40
    assert labels["name"], "the base it stands on"
    assert run(target, "hscr", "--version") == f"hscr {__version__}"


def test_it_runs_as_a_number_that_is_not_root_and_may_write_nowhere_else(target: str) -> None:
    assert inspect("image", image(target))["Config"]["User"] == "10001:10001"
    assert python(target, "import os; print([os.getuid(), os.getgid()])") == [10001, 10001]
    assert python(target, WHAT_CAN_BE_WRITTEN) == []


def test_it_has_what_it_runs_and_no_tool_to_build_with(target: str) -> None:
    found = python(target, WHAT_CAN_BE_FOUND)
    assert found["programs"] == []
    torch = [] if target == "gateway" else ["torch"]
    assert sorted(found["packages"]) == sorted(["celery", "uvicorn", *torch])
    assert "-dev" not in docker(
        "run", "--rm", image(target), "dpkg-query", "--show", "--showformat", "${Package} "
    )


def test_the_gateway_is_slim() -> None:
    assert inspect("image", image("gateway"))["Size"] < GATEWAY_LIMIT_BYTES


def test_the_tables_are_made_on_a_volume_and_found_again() -> None:
    volume = docker("volume", "create")
    try:
        mounted = ("--volume", f"{volume}:/data", "--network", "none", *CONFINED, image("gateway"))
        docker("run", "--rm", *mounted, "hscr", "db", "upgrade")
        assert "as this code needs" in docker("run", "--rm", *mounted, "hscr", "db", "check")
    finally:
        docker("volume", "rm", volume)


@pytest.fixture
def engine() -> Iterator[str]:
    container = docker("run", "--detach", *CONFINED, image("engine"))
    yield container
    docker("rm", "--force", "--volumes", container)


def test_the_engine_turns_healthy_by_itself_and_ends_when_asked(engine: str) -> None:
    health = lambda: inspect("container", engine)["State"]["Health"]["Status"]  # noqa: E731
    wait_until(lambda: health() == "healthy", seconds=240, what="the engine's health")
    docker("stop", "--time", "30", engine)
    state = inspect("container", engine)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
