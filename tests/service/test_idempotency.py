"""One idempotency key twice: one result, or a conflict."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from hscr.records import JobKind, Role
from tests.service.conftest import IMAGE, QUESTION, VERSIONS, b64

A, B = VERSIONS
KEY = {"Idempotency-Key": "0b8f5e0e"}


def test_the_same_question_again_gives_the_first_answer_without_the_engine(gateway, store, engine):
    first = gateway.ask(headers=KEY)
    asked = engine.metric("vllm:prompt_tokens_total")
    again = gateway.ask(headers=KEY)
    form = {"question": QUESTION, "sampling": '{"max_tokens": 8}'}
    sent = gateway.request("POST", "/v1/vqa", data=form, files={"image": ("x", IMAGE)}, headers=KEY)
    assert first.status_code == 200
    assert first.json() == again.json() == sent.json()
    assert engine.metric("vllm:prompt_tokens_total") == asked
    assert len(store.answers.page()) == 1
    with gateway.stream(
        "/v1/vqa",
        {"image": b64(IMAGE), "question": QUESTION, "sampling": {"max_tokens": 8}},
        headers=KEY,
    ) as events:
        told = [(event, identifier) for event, _, identifier in events]
    assert told == [("delta", ""), ("answer", first.json()["id"])]


@pytest.mark.parametrize("change", [{"question": "other?"}, {"adapter": "base"}, {"study": "s"}])
def test_another_question_under_the_same_key_is_a_conflict(gateway, store, change):
    gateway.ask(headers=KEY)
    other = gateway.ask(headers=KEY, **change)
    assert (other.status_code, other.json()["type"]) == (409, "/problems/idempotency-conflict")
    caption = gateway.post("/v1/captions", {"image": b64(IMAGE)}, headers=KEY)
    assert caption.status_code == 409
    assert len(store.answers.page()) == 1


def test_the_same_question_at_the_same_time_is_kept_once(gateway, store):
    with ThreadPoolExecutor(4) as clients:
        replies = [each.result() for each in [clients.submit(gateway.ask, headers=KEY) for _ in range(4)]]
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.json()["id"] for reply in replies}) == len(store.answers.page()) == 1


def test_keys_of_different_callers_do_not_meet(gateway, store):
    one, other = gateway.key(Role.CLIENT), gateway.key(Role.CLIENT)
    ids = {gateway.ask(headers=KEY | caller).json()["id"] for caller in (one, other)}
    assert len(ids) == 2


def test_feedback_and_jobs_happen_once(gateway, store):
    answer = gateway.answered()
    given = {"answer_id": answer.id, "verdict": "accept"}
    twice = [gateway.post("/v1/feedback", given, headers=KEY).json() for _ in range(2)]
    assert twice[0] == twice[1]
    assert len(store.answers.feedback(answer.id)) == 1
    assert gateway.post("/v1/feedback", given | {"comment": "?"}, headers=KEY).status_code == 409

    other = {"Idempotency-Key": "job-1"}
    jobs = [gateway.post("/v1/preference-jobs", {}, headers=other).json()["id"] for _ in range(2)]
    assert jobs[0] == jobs[1]
    assert len(store.jobs.page(kind=JobKind.GENERATE)) == 1
    changed = gateway.post("/v1/preference-jobs", {"config": {"seed": 1}}, headers=other)
    assert (changed.status_code, changed.json()["type"]) == (409, "/problems/idempotency-conflict")
    assert gateway.post("/v1/finetune-jobs", {}, headers=other).status_code == 409


def test_a_promotion_asked_again_after_it_happened_is_the_same_job(gateway, store):
    """Its connection may have broken between the commit and the reply."""
    asked = {"reason": "good", "override": True}
    path = f"/v1/adapters/{A}/promote"
    first = gateway.post(path, asked, headers=KEY)
    gateway.serve_version(A)
    again = gateway.post(path, asked, headers=KEY)
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["Location"] == first.headers["Location"]
    assert gateway.post(path, asked).status_code == 409, "it is active by now"
    assert gateway.post(path, {**asked, "reason": "other"}, headers=KEY).status_code == 409
    assert len(store.jobs.page(kind=JobKind.RELEASE)) == 1


def test_a_rollback_asked_again_does_not_go_forward(gateway, store):
    gateway.serve_version(A)
    gateway.serve_version(B)
    first, again = (
        gateway.post("/v1/adapters/rollback", {"reason": "worse"}, headers=KEY).json() for _ in range(2)
    )
    assert first == again
    assert (store.releases.pointer().active, store.releases.pointer().previous) == (A, B)
    other = gateway.post("/v1/adapters/rollback", {"reason": "other"}, headers=KEY)
    assert (other.status_code, other.json()["type"]) == (409, "/problems/idempotency-conflict")
    assert gateway.post("/v1/adapters/rollback", {"reason": "worse"}).json()["active"] == B
