"""The agent beside a real vLLM, which says less about itself than the embedded engine and checks nothing."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hscr.store.store import Store
from tests.serving import EngineProcess
from tests.waiting import wait_until
from tests.workers.engines import SEEN, loaded, probe, register, replica, start_agent
from tests.workers.harness import Processes, make_adapter
from workers.settings import EMBEDDED_MODEL

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = tmp_path_factory.mktemp("adapters")
    return [make_adapter(EMBEDDED_MODEL, made / str(seed), seed=seed, scale=0.2) for seed in (1, 2)]


@pytest.fixture(scope="module")
def probes(folders: list[Path]) -> list[dict[str, Any]]:
    return [probe(EMBEDDED_MODEL, folder) for folder in folders]


@pytest.fixture
def engine(phantom_vllm: EngineProcess) -> Iterator[EngineProcess]:
    yield phantom_vllm
    for name in phantom_vllm.adapters():
        phantom_vllm.unload(name)


def test_an_agent_loads_probes_reports_and_unloads(
    store: Store, processes: Processes, engine: EngineProcess, folders: list[Path], probes: list[Any]
) -> None:
    first, second = (register(store, EMBEDDED_MODEL, *each) for each in zip(folders, probes, strict=True))
    engine.load("somebody's", folders[0])
    agent = start_agent(processes, engine)

    seen = wait_until(lambda: replica(store), seconds=60, what="the replica")
    assert seen.ready
    assert seen.model == "base"
    assert seen.engine.startswith("vllm/0.")
    assert seen.numeric_mode == "cpu/float32"
    wait_until(lambda: engine.adapters() == set(), what="the stranger being unloaded")

    for version in (first, second):
        store.releases.propose(version.name, actor="a", reason="r")
        wait_until(lambda version=version: version.name in loaded(store), what="the candidate being reported")
        store.releases.promote(version.name, actor="a", reason="r", override=True, replicas_seen=SEEN)
    assert set(loaded(store)) == engine.adapters() == {first.name, second.name}

    store.releases.promote(None, actor="a", reason="r", override=True, replicas_seen=SEEN)
    wait_until(lambda: engine.adapters() == {second.name}, what="the oldest being unloaded")
    assert loaded(store) == (second.name,)

    agent.send_signal(signal.SIGTERM)
    assert agent.wait(15) == 0
    assert replica(store) is None


def test_a_version_that_answers_otherwise_than_its_trainer_saw_is_not_reported(
    store: Store, processes: Processes, engine: EngineProcess, folders: list[Path], probes: list[Any]
) -> None:
    swapped = register(store, EMBEDDED_MODEL, folders[0], probes[1])
    start_agent(processes, engine)
    wait_until(lambda: replica(store), seconds=60, what="the replica")
    store.releases.propose(swapped.name, actor="a", reason="r")
    problem = wait_until(lambda: (seen := replica(store)) and seen.problem, what="the refusal")
    assert "otherwise than its trainer" in problem
    assert loaded(store) == ()
    wait_until(lambda: engine.adapters() == set(), what="the version being unloaded")
