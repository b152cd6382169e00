"""What happens to answers in flight: clients that leave, engines that die, versions that change."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from urllib.parse import urlsplit

import pytest

from tests.engine.conftest import start
from tests.service.conftest import IMAGE, VERSIONS, Gateway, b64, equip, replica, standing_still
from tests.waiting import wait_until

A, B = VERSIONS
NOWHERE = "http://127.0.0.1:9"
LONG = {"image": b64(IMAGE), "question": "what is shown?", "sampling": {"max_tokens": 450}}
"""Every version answers this greedily with all 450 tokens: hundreds of milliseconds on any machine."""

SEEN = timedelta(hours=1)


def aborted(engine) -> float:
    return engine.metric("vllm:request_success_total", finished_reason="abort")


def test_a_client_that_leaves_a_stream_stops_its_request(gateway, engine, store):
    before = aborted(engine)
    with gateway.stream("/v1/vqa", LONG) as events:
        next(events)
    wait_until(lambda: aborted(engine) == before + 1, what="the engine's abort")
    wait_until(lambda: gateway.metric("hscr_aborted_total") == 1, what="the gateway's count")
    assert store.answers.page() == []


def test_a_client_that_leaves_before_the_whole_answer_stops_its_request(gateway, engine, store):
    before = aborted(engine)
    body = json.dumps(LONG).encode()
    at = urlsplit(gateway.url)
    with socket.create_connection((at.hostname, at.port)) as connection:
        head = f"POST /v1/vqa HTTP/1.1\r\nHost: {at.netloc}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: engine.metric("vllm:num_requests_running") == 1, what="the engine's start")
    wait_until(lambda: aborted(engine) == before + 1, what="the engine's abort")
    assert store.answers.page() == []


def test_an_engine_that_dies_ends_the_stream_with_an_error(serve, store, model_folder):
    with start(model_folder, "--served-model-name", "tiny") as doomed:
        store.releases.report_replica(replica(doomed.address))
        gateway = serve()
        with gateway.stream("/v1/vqa", LONG) as events:
            assert next(events)[0] == "delta"
            doomed.process.kill()
            told = list(events)
    event, data, _ = told[-1]
    assert (event, json.loads(data)["type"]) == ("error", "/problems/engine-interrupted")
    assert {event for event, _, _ in told[:-1]} <= {"delta"}
    assert store.answers.page() == []
    later = gateway.ask()
    assert (later.status_code, later.json()["type"]) == (503, "/problems/engine-unavailable")
    assert int(later.headers["retry-after"]) > 0
    assert doomed.address not in later.text


@pytest.mark.parametrize("options", [{}, {"stream": True}])
def test_a_dead_replica_costs_a_second_attempt_and_no_error(gateway, store, options):
    store.releases.report_replica(replica(NOWHERE, "a-dead-one"))
    wait_until(lambda: gateway.metric("hscr_replicas") == 2, what="the second replica")
    assert gateway.ask(**options).status_code == 200
    assert gateway.metric("hscr_retried_total") == 1


def test_a_version_goes_only_to_ready_replicas_that_have_it(gateway, store, engine):
    gateway.serve_version(A)
    for elsewhere in (
        replica(NOWHERE, "a-without", loaded=()),
        replica(NOWHERE, "b-not-ready", ready=False),
    ):
        store.releases.report_replica(elsewhere)
    wait_until(lambda: gateway.metric("hscr_replicas") == 2, what="the replicas")
    assert gateway.ask().status_code == 200
    assert gateway.metric("hscr_retried_total") == 0
    store.releases.report_replica(replica(engine.address, loaded=()))
    wait_until(lambda: gateway.get("/readyz").status_code == 503, what="the loss of the version")
    lost = gateway.ask()
    assert (lost.status_code, lost.json()["type"]) == (503, "/problems/engine-unavailable")


def retired(store, version) -> bool:
    """Whether the replica might unload the version now."""
    return store.releases.retire("engine-0", version, gateways_seen=SEEN)


def swap_twice(gateway, store):
    """From A over B to the base model: what nobody asked is free at once, A is not while it answers."""
    gateway.serve_version(B)
    gateway.serve_version(None)
    wait_until(lambda: retired(store, "unasked@0"), what="the gateway's report of the new epoch")
    assert not retired(store, A)


def test_a_stream_keeps_its_version_over_a_swap_and_is_counted_to_its_end(gateway, store, engine):
    gateway.serve_version(A)
    with gateway.stream("/v1/vqa", LONG) as events:
        next(events)
        with standing_still(engine.process):
            swap_twice(gateway, store)
        event, data, _ = list(events)[-1]
    assert event == "answer"
    assert json.loads(data)["provenance"]["adapter"] == A
    wait_until(lambda: retired(store, A), what="the drain")
    assert json.loads(data)["text"] == gateway.store.answers.page()[0].text


def test_swaps_under_traffic_fail_nothing_and_mix_nothing(gateway):
    gateway.serve_version(A)
    gateway.serve_version(B)
    expected = {name: gateway.answered(adapter=name).text for name in (A, B)}
    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(gateway.ask, stream=n % 2 == 0) for n in range(24)]
        for _ in range(4):
            assert gateway.post("/v1/adapters/rollback", {"reason": "swap"}).status_code == 200
            gateway.epoch_seen()
        replies = [each.result() for each in asked]
    assert {reply.status_code for reply in replies} == {200}
    kept = gateway.store.answers.page(limit=200)
    made = [answer for answer in kept if answer.text == expected[answer.provenance.adapter or ""]]
    assert len(made) == len(kept) == 26


def test_more_questions_than_admitted_are_told_to_come_back(serve, store, engine):
    equip(store, engine)
    gateway: Gateway = serve(max_in_flight=1)
    with gateway.stream("/v1/vqa", LONG) as events:
        next(events)
        refused = gateway.ask()
    assert (refused.status_code, refused.json()["type"]) == (429, "/problems/overloaded")
    assert int(refused.headers["retry-after"]) > 0
    assert gateway.metric("hscr_rejected_total", slug="overloaded") == 1
    wait_until(lambda: gateway.ask().status_code == 200, what="a free place")


@pytest.mark.parametrize("options", [{}, {"stream": True}])
def test_an_answer_that_takes_too_long_is_given_up(serve, store, engine, options):
    equip(store, engine)
    before = aborted(engine)
    gateway: Gateway = serve(request_deadline=0.05)
    reply = gateway.post("/v1/vqa", LONG | options)
    assert "/problems/engine-unavailable" in reply.text
    assert "0.05 seconds" in reply.text
    wait_until(lambda: aborted(engine) == before + 1, what="the engine's abort")
    assert store.answers.page() == []
