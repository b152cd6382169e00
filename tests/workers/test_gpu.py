"""The warm child: its work, its warmth, and every way to lose it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hscr.errors import AdapterRefused, InvalidConfig, JobCancelled
from hscr.records import PreferenceRecord
from hscr.store.store import Store
from tests.waiting import wait_until
from tests.workers.harness import FAST, RANDOM, add_sources, alive, migrated
from workers.gpu import Event, Gpu
from workers.gpu_child import Channel
from workers.leases import AttemptOver
from workers.settings import WorkerSettings

# One child serves most of these tests, as it would serve most jobs.


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> WorkerSettings:
    home = tmp_path_factory.mktemp("gpu")
    return migrated(WorkerSettings(home=home, model_path=tiny, **FAST))


@pytest.fixture(scope="module")
def store(settings: WorkerSettings) -> Iterator[Store]:
    with Store.open(settings) as opened:
        yield opened


@pytest.fixture(scope="module")
def gpu(settings: WorkerSettings) -> Iterator[Gpu]:
    gpu = Gpu(settings)
    yield gpu
    gpu.close()


def generation(store: Store, number: int, **changes: Any) -> dict[str, Any]:
    sources = [source.model_dump(mode="json") for source in add_sources(store, number)]
    return {"sources": sources, "config": RANDOM.resolved(), "adapter": None, **changes}


def ignore(_: Event) -> None:
    """Events of no interest."""


def go_on() -> None:
    """No reason to stop."""


class Stopper:
    """A `check` that asks for an end once an event has come."""

    def __init__(self) -> None:
        self.wanted = False
        self.asked_at = 0.0

    def on_event(self, _: Event) -> None:
        self.wanted = True
        self.asked_at = time.monotonic()

    def check(self) -> None:
        if self.wanted:
            raise JobCancelled("enough")


def test_the_child_works_and_stays_warm(store: Store, gpu: Gpu) -> None:
    events: list[Event] = []
    arguments = generation(store, 6)

    first = gpu.run("generate", arguments, on_event=events.append, check=go_on)
    pid = gpu.pid
    again: list[Event] = []
    gpu.run("generate", arguments, on_event=again.append, check=go_on)

    records = [PreferenceRecord.model_validate(e["record"]) for e in events if e["event"] == "record"]
    assert records
    assert len(events) == 6
    assert {record.model_digest for record in records} == {first["model_digest"]}
    assert gpu.pid == pid
    assert [e.get("record", {}).get("id") for e in again] == [e.get("record", {}).get("id") for e in events]


def test_a_missing_image_is_a_skip(store: Store, gpu: Gpu) -> None:
    arguments = generation(store, 2)
    for source in arguments["sources"]:
        source["image_digest"] = "0" * 64
    events: list[Event] = []
    gpu.run("generate", arguments, on_event=events.append, check=go_on)
    assert [e["event"] for e in events] == ["skip", "skip"]
    assert "expired" in events[0]["reason"]


def test_its_errors_keep_class_and_remedy(store: Store, gpu: Gpu, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig) as caught:
        gpu.run("generate", generation(store, 1, config={"sed": 1}), on_event=ignore, check=go_on)
    assert "sed" in caught.value.detail
    assert "seed" in caught.value.remedy
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    bad = {"name": "hscr@bad", "digest": store.blobs.put_folder(folder)}
    with pytest.raises(AdapterRefused):
        gpu.run("generate", generation(store, 1, adapter=bad), on_event=ignore, check=go_on)
    assert gpu.pid is not None, "an error leaves the child warm"


def test_two_threads_take_turns(store: Store, gpu: Gpu) -> None:
    arguments = generation(store, 4)
    results: list[dict[str, Any]] = []

    def work() -> None:
        results.append(gpu.run("generate", arguments, on_event=ignore, check=go_on))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2


def test_a_killed_child_ends_the_attempt_and_the_next_one_has_another(store: Store, gpu: Gpu) -> None:
    arguments = generation(store, 200)

    def kill(_: Event) -> None:
        assert gpu.pid is not None
        os.kill(gpu.pid, signal.SIGKILL)

    with pytest.raises(AttemptOver, match="SIGKILL"):
        gpu.run("generate", arguments, on_event=kill, check=go_on)

    arguments["sources"] = arguments["sources"][:1]
    assert gpu.run("generate", arguments, on_event=ignore, check=go_on)


def test_a_stop_is_obeyed_and_leaves_the_child_warm(store: Store, gpu: Gpu) -> None:
    stopper = Stopper()
    arguments = generation(store, 400)
    with pytest.raises(JobCancelled):
        gpu.run("generate", arguments, on_event=stopper.on_event, check=stopper.check)
    assert time.monotonic() - stopper.asked_at < 10
    pid = gpu.pid
    assert pid is not None
    arguments["sources"] = arguments["sources"][:1]
    gpu.run("generate", arguments, on_event=ignore, check=go_on)
    assert gpu.pid == pid


def test_a_child_that_does_not_obey_is_killed_within_ten_seconds(store: Store, gpu: Gpu) -> None:
    stopper = Stopper()

    def freeze(event: Event) -> None:
        assert gpu.pid is not None
        os.kill(gpu.pid, signal.SIGSTOP)
        stopper.on_event(event)

    with pytest.raises(JobCancelled):
        gpu.run("generate", generation(store, 200), on_event=freeze, check=stopper.check)
    assert time.monotonic() - stopper.asked_at < 10
    assert gpu.pid is None


def test_a_child_that_stands_still_is_killed(
    store: Store, gpu: Gpu, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a task, and between two when it does not even read the next one."""
    gpu.run("generate", generation(store, 1), on_event=ignore, check=go_on)
    pids: list[int] = []

    def freeze(_: object = None) -> None:
        assert gpu.pid is not None
        pids.append(gpu.pid)
        os.kill(gpu.pid, signal.SIGSTOP)
        monkeypatch.setattr(settings, "child_silence_seconds", 0.5)

    with pytest.raises(AttemptOver, match=r"no progress for 0\.5 s"):
        gpu.run("generate", generation(store, 200), on_event=freeze, check=go_on)
    assert gpu.pid is None

    monkeypatch.undo()
    gpu.run("generate", generation(store, 1), on_event=ignore, check=go_on)
    freeze()
    more_than_a_pipe_holds = generation(store, 1)
    more_than_a_pipe_holds["sources"] *= 1000
    with pytest.raises(AttemptOver, match=r"took no request for 0\.5 s"):
        gpu.run("generate", more_than_a_pipe_holds, on_event=ignore, check=go_on)
    assert len(set(pids)) == 2
    assert not any(alive(pid) for pid in pids)


def test_only_a_task_that_asks_whether_to_go_on_gives_a_sign_of_life() -> None:
    """Whoever spins elsewhere is as silent as one that stands still."""
    events, theirs = os.pipe()
    os.set_blocking(events, False)
    channel = Channel(7, theirs, {})
    assert [channel.stopped() for _ in range(3)] == [False] * 3
    assert [json.loads(line) for line in os.read(events, 1000).splitlines()] == [{"id": 7, "event": "alive"}]
    with pytest.raises(BlockingIOError):
        os.read(events, 1000)
    os.close(events)
    os.close(theirs)


def test_an_error_that_nobody_foresaw_ends_attempt_and_child(store: Store, gpu: Gpu) -> None:
    """Not the job: the next attempt has a child whose device is not spoilt."""
    arguments = generation(store, 1)
    arguments["sources"][0]["image_digest"] = store.blobs.put(b"no image")
    with pytest.raises(AttemptOver, match="unexpected UnidentifiedImageError"):
        gpu.run("generate", arguments, on_event=ignore, check=go_on)
    assert gpu.pid is None


def test_an_idle_child_gives_its_memory_back(store: Store, settings: WorkerSettings) -> None:
    gpu = Gpu(settings.model_copy(update={"child_idle_seconds": 0.2}))
    gpu.run("generate", generation(store, 1), on_event=ignore, check=go_on)
    wait_until(lambda: gpu.pid is None, what="the child's end")
    gpu.close()


PARENT = """
import json, os, sys
from workers.gpu import Gpu
from workers.settings import WorkerSettings

gpu = Gpu(WorkerSettings())
arguments = json.load(sys.stdin)
pids = []
def on_event(event):
    if not pids:
        pids.append(gpu.pid)
        print(gpu.pid, flush=True)
gpu.run("generate", arguments, on_event=on_event, check=lambda: None)
"""


def test_a_child_does_not_outlive_its_parent(store: Store, settings: WorkerSettings) -> None:
    values = settings.model_dump(exclude_none=True)
    environment = {f"HSCR_{name.upper()}": str(value) for name, value in values.items()}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(json.dumps(generation(store, 400)))
    parent.stdin.close()
    child = int(parent.stdout.readline())
    assert alive(child)

    parent.kill()
    parent.wait()

    wait_until(lambda: not alive(child), seconds=10, what="the child's end")
    parent.stdout.close()
