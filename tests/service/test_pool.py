"""Which replica is asked: never a broken, silent or full one while another is left."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count

import pytest

import service.circuit
import service.engines
from hscr.engine import EngineClient
from hscr.errors import EngineUnavailable
from service.circuit import Circuit, CircuitState
from tests.engine.conftest import ask
from tests.service.conftest import IMAGE, QUESTION, VERSIONS, Gateway, b64, replica
from tests.service.scripted import (
    Exchange,
    Script,
    ScriptedEngine,
    agrees,
    breaks_off,
    fails,
    falls_silent,
    says_nothing,
    scripted,
)
from tests.waiting import wait_until

FOREVER = 3600.0
A, B = VERSIONS
ASKED = {"image": b64(IMAGE), "question": QUESTION}


@pytest.fixture
def engines(store) -> Iterator[Callable[[str, Script], ScriptedEngine]]:
    """`engines(name, script)` starts and reports an engine; equal ones take turns, first by their names."""
    with ExitStack() as stack:

        def start(name: str, script: Script = agrees) -> ScriptedEngine:
            engine = stack.enter_context(scripted(script))
            store.releases.report_replica(replica(engine.address, name, loaded=()))
            return engine

        yield start


def circuit(gateway: Gateway, name: str) -> CircuitState:
    return CircuitState(gateway.metric("hscr_replica_circuit", replica=name))


def failing_until_open(gateway: Gateway, name: str, **options) -> None:
    for _ in range(3):
        assert gateway.ask(**options).status_code in {200, 503}
    wait_until(lambda: circuit(gateway, name) is not CircuitState.CLOSED, what="the open circuit")


def test_a_replica_that_keeps_failing_is_left_alone(serve, engines):
    bad, good = engines("a", fails), engines("b")
    gateway = serve(circuit_pause=FOREVER, circuit_longest_pause=FOREVER)
    failing_until_open(gateway, "a")
    assert circuit(gateway, "a") is CircuitState.OPEN
    assert circuit(gateway, "b") is CircuitState.CLOSED
    assert all(gateway.ask().status_code == 200 for _ in range(5))
    assert (len(bad.exchanges), len(good.exchanges)) == (3, 8)


def test_one_request_tries_a_broken_replica_and_its_success_closes_the_circuit(serve, engines):
    bad, good = engines("a", fails), engines("b")
    gateway = serve(circuit_pause=0.05, circuit_longest_pause=0.05)
    failing_until_open(gateway, "a")
    go = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def waits(exchange: Exchange) -> None:
        loops.append(asyncio.get_running_loop())
        await go.wait()
        await exchange.answer("back again.")

    bad.script = waits
    with ThreadPoolExecutor(1) as client:

        def tried() -> bool:
            asked.append(client.submit(gateway.ask))
            wait_until(lambda: asked[-1].done() or loops, what="an answer or a trial")
            return bool(loops)

        asked: list = []
        wait_until(tried, what="the trial")
        before = len(bad.exchanges), len(good.exchanges)
        assert all(gateway.ask().status_code == 200 for _ in range(4))
        assert (len(bad.exchanges), len(good.exchanges)) == (before[0], before[1] + 4)
        assert circuit(gateway, "a") is CircuitState.HALF_OPEN
        loops[0].call_soon_threadsafe(go.set)
        assert asked[-1].result().json()["text"] == "back again."
    wait_until(lambda: circuit(gateway, "a") is CircuitState.CLOSED, what="the closed circuit")
    assert gateway.ask().json()["text"] == "back again."


def test_a_broken_replica_is_asked_when_no_other_is_left(serve, engines):
    only = engines("a", fails)
    gateway = serve(circuit_pause=FOREVER, circuit_longest_pause=FOREVER)
    failing_until_open(gateway, "a")
    assert gateway.get("/readyz").status_code == 200
    only.script = agrees
    assert gateway.ask().status_code == 200
    wait_until(lambda: circuit(gateway, "a") is CircuitState.CLOSED, what="the closed circuit")


def test_streams_that_break_off_open_the_circuit_and_are_not_asked_again(serve, engines, store):
    bad, good = engines("a", breaks_off), engines("b")
    gateway = serve(circuit_pause=FOREVER, circuit_longest_pause=FOREVER)
    texts = [gateway.ask(stream=True).text for _ in range(6)]
    assert ["/problems/engine-interrupted" in text for text in texts] == [True, False] * 3
    assert "says yes" in gateway.ask(stream=True).text
    assert (len(bad.exchanges), len(good.exchanges)) == (3, 4)
    assert [answer.text for answer in store.answers.page()] == ["tiny says yes."] * 4


def test_equally_busy_replicas_take_turns(serve, engines):
    """So that many gateways, each of which counts its own requests alone, do not all ask the first."""
    three = [engines(name) for name in "abc"]
    gateway = serve()
    for done in range(1, 7):
        assert gateway.ask().status_code == 200
        counts = [len(engine.exchanges) for engine in three]
        assert sum(counts) == done
        assert max(counts) - min(counts) <= 1


def test_a_whole_answer_that_breaks_off_is_asked_again_and_kept_once(serve, engines, store):
    broken, good = engines("a", breaks_off), engines("b")
    gateway = serve()
    assert gateway.ask().json()["text"] == "tiny says yes."
    assert (len(broken.exchanges), len(good.exchanges)) == (1, 1)
    assert gateway.metric("hscr_retried_total") == 1
    assert len(store.answers.page()) == 1


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that a test sets."""
    time = [100.0]
    monkeypatch.setattr(service.circuit, "monotonic", lambda: time[0])
    return time


def test_the_pause_grows_with_each_failed_trial_up_to_its_bound(clock):
    circuit = Circuit(threshold=2, pause=1, longest_pause=3)
    circuit.failed()
    assert circuit.state is CircuitState.CLOSED
    for pause in (1, 2, 3, 3):
        circuit.failed()
        assert (circuit.state, circuit.admits) == (CircuitState.OPEN, False)
        circuit.failed()  # of a request that began before the circuit opened: no longer pause for that
        clock[0] += pause - 0.01
        assert not circuit.admits
        clock[0] += 0.01
        assert (circuit.state, circuit.admits) == (CircuitState.HALF_OPEN, True)
    circuit.succeeded()
    circuit.failed()
    assert circuit.admits
    circuit.failed()
    clock[0] += 1
    assert circuit.admits, "a success makes the pause short again"


def test_a_trial_that_proves_nothing_makes_room_for_the_next(clock):
    circuit = Circuit(threshold=1, pause=1, longest_pause=1)
    circuit.failed()
    clock[0] += 1
    with circuit.request():
        assert not circuit.admits
        with circuit.request():
            assert not circuit.admits
        assert not circuit.admits, "only the trial's own end lets another in"
    assert circuit.admits


def test_full_engines_get_no_more_and_the_client_is_told_when_to_come_back(serve, engines, monkeypatch):
    one, other = engines("a"), engines("b")
    gateway = serve(max_outstanding_per_replica=2)
    ticks = count(step=51)
    with monkeypatch.context() as patched:
        patched.setattr(service.engines, "monotonic", lambda: float(next(ticks)))
        assert gateway.ask().status_code == 200  # took 51 s by this clock; the mean begins at 1 s
    one.script = other.script = falls_silent
    with ExitStack() as streams:
        held = [streams.enter_context(gateway.stream("/v1/vqa", ASKED)) for _ in range(4)]
        assert [next(events)[0] for events in held] == ["delta"] * 4
        asked = len(one.exchanges), len(other.exchanges)
        assert asked == (3, 2)
        refused = gateway.ask()
        assert (refused.status_code, refused.json()["type"]) == (429, "/problems/overloaded")
        assert refused.headers["retry-after"] == "6"
        assert (len(one.exchanges), len(other.exchanges)) == asked
        assert gateway.metric("hscr_rejected_total", slug="overloaded") == 1
        one.script = other.script = agrees
    wait_until(lambda: gateway.ask().status_code == 200, what="room")


def test_an_engine_that_says_it_is_full_is_believed(serve, engines):
    async def full(exchange: Exchange) -> None:
        await exchange.status(429, {"error": {"message": "queue full"}})

    engines("a", full)
    refused = serve().ask()
    assert (refused.status_code, refused.json()["type"]) == (429, "/problems/overloaded")


def test_a_replica_whose_agent_is_silent_is_asked_last(serve, engines, store):
    silent, heard = engines("a"), engines("b")
    gateway = serve(replicas_silent=0.3)

    def reported_and_asked() -> bool:
        store.releases.report_replica(replica(heard.address, "b", loaded=()))
        assert gateway.ask().status_code == 200
        return bool(heard.exchanges)

    wait_until(reported_and_asked, what="the other replica's turn")
    store.releases.report_replica(replica(heard.address, "b", loaded=(), ready=False))
    wait_until(lambda: gateway.metric("hscr_replicas") == 1, what="the end of the other")
    before = len(silent.exchanges)
    assert gateway.ask().status_code == 200
    assert len(silent.exchanges) == before + 1


def test_replicas_that_differ_from_what_is_desired_are_counted(gateway, store, engine):
    """The pointer names A and B once both were active; `gateway` has one replica with both."""
    drift = lambda: (  # noqa: E731
        gateway.metric("hscr_replicas_drifted", kind="missing"),
        gateway.metric("hscr_replicas_drifted", kind="surplus"),
    )
    wait_until(lambda: drift() == (0, 1), what="two versions that nobody wants")
    gateway.serve_version(A)
    gateway.serve_version(B)
    wait_until(lambda: drift() == (0, 0), what="agreement")
    store.releases.report_replica(replica(engine.address, "second", loaded=(A, "hscr@eeeeeeeeeeee")))
    wait_until(lambda: drift() == (1, 1), what="a replica with the wrong one of two")


@pytest.mark.anyio
async def test_connecting_and_reading_have_limits_of_their_own():
    with scripted(says_nothing) as mute:
        async with EngineClient(mute.address, timeout=0.2, connect_timeout=FOREVER) as client:
            with pytest.raises(EngineUnavailable, match="reading"):
                await client.chat(ask())
    with socket.socket() as busy, ExitStack() as callers:
        busy.bind(("127.0.0.1", 0))
        busy.listen(0)  # whoever comes while one waits gets no answer to its SYN
        for _ in range(2):
            caller = callers.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(busy.getsockname())
        address = f"http://127.0.0.1:{busy.getsockname()[1]}"
        async with EngineClient(address, timeout=FOREVER, connect_timeout=0.2) as client:
            with pytest.raises(EngineUnavailable, match="Connection timeout"):
                await client.chat(ask())


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"
