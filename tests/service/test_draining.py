"""SIGTERM: the gateway is not ready, then deaf, then gone; what it had begun ends well, within bounds."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx2
import pytest

from tests.service.conftest import IMAGE, QUESTION, b64, events_of, replica
from tests.service.scripted import Exchange, scripted
from tests.service.test_process import free_port
from tests.waiting import wait_until

BODY = {"image": b64(IMAGE), "question": QUESTION, "stream": True}


@dataclass
class Leaving:
    """A gateway of its own process; its engine says a first word, and the last one after `go_on`."""

    process: subprocess.Popen[bytes]
    client: httpx2.Client
    go_on: threading.Event

    def sigterm(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def slug(self) -> str | None:
        """Of the problem that keeps it from being ready; None when it refuses the connection."""
        with suppress(httpx2.TransportError):
            return self.client.get("/readyz").json().get("type", "ready")
        return None

    @contextmanager
    def stream(self) -> Iterator[Iterator[tuple[str, str, str]]]:
        """The events after the first one."""
        with self.client.stream("POST", "/v1/vqa", json=BODY) as response:
            events = events_of(response.iter_lines())
            assert next(events)[0] == "delta"
            yield events


@pytest.fixture
def leave(settings, store) -> Iterator[Callable[..., Leaving]]:
    started: list[Leaving] = []
    go_on = threading.Event()

    async def held(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.delta("one ")
        while not go_on.is_set() and not exchange.left:
            await asyncio.sleep(0.02)
        await exchange.delta("two", "stop")
        await exchange.write(b"data: [DONE]\n\n")

    def serve(**environment: str) -> Leaving:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "--host", "127.0.0.1", "--port", str(port)],
            env={"HSCR_HOME": str(settings.home), "HSCR_REPLICAS_SEEN": "3600", "PATH": "/usr/bin"}
            | environment,
        )
        client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        one = Leaving(process, client, go_on)
        started.append(one)
        wait_until(lambda: one.slug() == "ready", seconds=60, what="readiness")
        return one

    with scripted(held) as engine:
        store.releases.report_replica(replica(engine.address, loaded=()))
        yield serve
        go_on.set()
        for each in started:
            each.client.close()
            each.process.kill()
            each.process.wait()


def test_open_streams_end_well_and_new_connections_are_refused(leave):
    gateway = leave()
    with gateway.stream() as events:
        gateway.sigterm()
        wait_until(lambda: gateway.slug() is None, what="refused connections")
        assert gateway.process.poll() is None
        gateway.go_on.set()
        told = list(events)
    assert told[-1][0] == "answer"
    assert json.loads(told[-1][1])["text"] == "one two"
    assert gateway.process.wait(60) == 0


def test_readiness_goes_first_and_a_second_signal_ends_it_at_once(leave):
    gateway = leave(HSCR_DRAIN_NOTICE="3600")
    job = gateway.client.post("/v1/preference-jobs", json={}).json()["id"]
    with gateway.client.stream("GET", f"/v1/jobs/{job}/events") as story, gateway.stream() as events:
        gateway.sigterm()
        wait_until(lambda: gateway.slug() == "/problems/copy-leaving", what="unreadiness")
        # Whoever follows a job is sent to another copy, though the job goes on.
        assert [name for name, _, _ in events_of(story.iter_lines())] == ["state"]
        assert gateway.client.get("/livez").status_code == 200, "it answers until its notice is over"
        gateway.sigterm()
        assert gateway.process.wait(60) == 0
        with suppress(httpx2.TransportError):
            assert "answer" not in {name for name, _, _ in events}


def test_a_stream_without_end_is_cut_after_the_grace(leave):
    gateway = leave(HSCR_DRAIN_GRACE="1")
    with gateway.stream() as events:
        gateway.sigterm()
        assert gateway.process.wait(60) == 0
        with suppress(httpx2.TransportError):
            assert "answer" not in {name for name, _, _ in events}
