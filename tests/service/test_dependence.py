"""Asking how much the image changed an answer: accepted once, told afterwards, gone with the image."""

import threading
from datetime import timedelta

import pytest

from hscr.records import Answer, JobKind, Role, TokenDependence, VisualDependence
from hscr.store.answers import add_answer_dependence
from service.schemas import NOTICE
from tests.service.conftest import QUESTION, VERSIONS, chat_body
from workers.contract import ScoreAnswerPayload

LEASE = timedelta(minutes=5)
A = next(iter(VERSIONS))


def path(answer: Answer) -> str:
    return f"/v1/answers/{answer.id}/visual-dependence"


def score(store, answer: Answer, payload: ScoreAnswerPayload, **changes) -> VisualDependence:
    """As the worker would."""
    token = TokenDependence(text="no", content=True, full=-0.5, dropped=-1.5, difference=1.0)
    found = VisualDependence(
        answer_id=answer.id, score=1.0, tokens=(token,), dropping=payload.dropping, model_digest="m" * 64,
        adapter=answer.provenance.adapter, adapter_digest=answer.provenance.adapter_digest,
        numeric_mode="cpu/float32", vision_numeric_mode="cpu/float32", engine="embedded/0.1.0",
        job_id="job_x",
    ).but(**changes)  # fmt: skip
    with store.database.write() as connection:
        add_answer_dependence(connection, found)
    return found


def test_it_is_a_durable_job_and_then_a_result(gateway, store):
    gateway.serve_version(A)
    answer = gateway.answered()
    assert gateway.get(path(answer)).status_code == 404
    accepted = gateway.post(path(answer))
    assert accepted.status_code == 202
    job = store.jobs.get(accepted.json()["id"])
    assert accepted.headers["location"] == f"/v1/jobs/{job.id}"
    assert job.kind is JobKind.SCORE_ANSWER
    assert [due for _, due, _ in store.jobs.due()] == [job.id]
    payload = ScoreAnswerPayload.model_validate(job.payload)
    assert payload == ScoreAnswerPayload(answer_id=answer.id)

    found = score(store, answer, payload)
    told = gateway.get(path(answer)).json()
    assert told == found.model_dump(mode="json") | {"notice": NOTICE}
    assert told["adapter"] == A
    again = gateway.post(path(answer), {"mode": "zero"})
    assert (again.status_code, again.json()) == (200, told)
    assert len(store.jobs.due()) == 1
    lineage = gateway.get(f"/v1/answers/{answer.id}/lineage").json()
    assert lineage["visual_dependence"] == found.model_dump(mode="json")


def test_other_settings_are_another_result(gateway, store):
    answer = gateway.answered()
    payload = ScoreAnswerPayload(answer_id=answer.id)
    other = payload.dropping.but(seed=1)
    score(store, answer, payload, dropping=other)
    assert gateway.post(path(answer)).status_code == 202
    score(store, answer, payload, score=0.25)
    assert gateway.get(path(answer)).json()["score"] == 0.25
    score(store, answer, payload, score=0.5)
    assert gateway.get(path(answer)).json()["score"] == 0.5
    assert store.answers.dependence(answer.id, other).score == 1.0


def test_leaving_visual_tokens_out_is_refused(gateway):
    answer = gateway.answered()
    refused = gateway.post(path(answer), {"mode": "delete"})
    assert refused.status_code == 422
    assert refused.json()["type"] == "/problems/invalid-config"
    assert "`zero`" in refused.json()["remedy"]
    assert gateway.post(path(answer), {"mode": "attn_mask"}).status_code == 422


def test_without_the_image_it_is_gone(gateway, store):
    expired, deleted = gateway.answered(study="s-1"), gateway.answered(study="s-2")
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE images SET expires_at = '2020-01-01 00:00:00' WHERE study = 's-1'")
    refused = gateway.post(path(expired))
    assert refused.status_code == 410
    assert refused.json()["remedy"].startswith("Ask the question again")
    score(store, deleted, ScoreAnswerPayload(answer_id=deleted.id))
    assert gateway.get(path(deleted)).status_code == 200
    gateway.request("DELETE", "/v1/studies/s-2")
    assert gateway.get(path(deleted)).status_code == 410
    assert gateway.post(path(deleted)).status_code == 410
    assert store.answers.dependence(deleted.id) is None


def test_a_result_outlives_its_image(gateway, store):
    answer = gateway.answered()
    score(store, answer, ScoreAnswerPayload(answer_id=answer.id))
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE images SET expires_at = '2020-01-01 00:00:00'")
    assert gateway.get(path(answer)).status_code == 200
    assert gateway.post(path(answer)).status_code == 200


@pytest.mark.parametrize(("turns", "status"), [(1, 202), (3, 409)])
def test_only_a_single_turn_can_be_scored(gateway, store, turns, status):
    body = chat_body()
    more = [{"role": "assistant", "content": "no."}, {"role": "user", "content": QUESTION}]
    body["messages"] += more[: turns - 1]
    answer = store.answers.get(gateway.post("/v1/chat/completions", body).json()["id"])
    assert gateway.post(path(answer)).status_code == status


def test_an_idempotency_key_gives_one_job_also_after_it_has_ended(gateway, store):
    first, second = gateway.answered(), gateway.answered()
    headers = {"Idempotency-Key": "score-1"}
    jobs = [gateway.post(path(first), headers=headers).json()["id"] for _ in range(2)]
    assert jobs[0] == jobs[1]
    score(store, first, ScoreAnswerPayload.model_validate(store.jobs.get(jobs[0]).payload))
    again = gateway.post(path(first), headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, jobs[0])
    assert gateway.post(path(first)).status_code == 200
    assert gateway.post(path(second), headers=headers).status_code == 409


def test_a_client_follows_its_own_job_and_no_other(gateway, store):
    one, other, reviewer = (gateway.key(role) for role in (Role.CLIENT, Role.CLIENT, Role.REVIEWER))
    answer = store.answers.get(gateway.ask(headers=one).json()["id"])
    job = gateway.post(path(answer), headers=one).json()["id"]
    reached = [gateway.get(f"/v1/jobs/{job}", headers=key).status_code for key in (one, other, reviewer)]
    assert reached == [200, 403, 200]
    claimed = store.jobs.claim(job, "worker", LEASE)
    assert claimed is not None
    end = threading.Thread(target=finish, args=(store, job))
    end.start()
    with gateway.stream(f"/v1/jobs/{job}/events", {}, method="GET", headers=one) as events:
        assert "running" in "".join(data for _, data, _ in events)
    end.join()
    assert gateway.get(f"/v1/jobs/{job}/events", headers=other).status_code == 403


def finish(store, job: str) -> None:
    with store.jobs.fenced(job, 1) as connection:
        store.jobs.succeed(connection, job, {})
