"""Jobs over HTTP: accepted durably, followed as events, cancelled."""

import threading
from datetime import timedelta

import pytest

from hscr.errors import HscrError
from hscr.records import Job, JobKind, JobState, Role
from tests.service.conftest import IMAGE, QUESTION, b64
from tests.stored import images_in
from tests.waiting import wait_until

LEASE = timedelta(minutes=5)
ROW = {"image": b64(IMAGE), "question": QUESTION, "answer": "no."}


def test_an_accepted_job_is_durable_and_due(gateway, store):
    reply = gateway.post("/v1/preference-jobs", {"config": {"seed": 7}, "then": {"method": "hscr"}})
    assert reply.status_code == 202
    told = reply.json()
    assert reply.headers["location"] == f"/v1/jobs/{told['id']}"
    kept = store.jobs.get(told["id"])
    assert kept.model_dump(mode="json") == told
    assert (kept.kind, kept.state) == (JobKind.GENERATE, JobState.QUEUED)
    assert kept.payload["config"]["seed"] == 7
    assert kept.payload["then"]["evaluate"]["suite"] == "phantom"
    assert [job_id for _, job_id, _ in store.jobs.due()] == [kept.id]
    assert gateway.get(reply.headers["location"]).json() == told


def test_uploaded_rows_become_consented_sources_with_their_images(gateway, store):
    body = {"rows": [ROW, ROW, ROW | {"answer": "yes.", "study": "s-2"}], "consent": True}
    job = store.jobs.get(gateway.post("/v1/preference-jobs", body).json()["id"])
    sources = store.preferences.sources(job.payload["source_ids"])
    assert sorted(source.chosen for source in sources) == ["no.", "yes."]
    assert all(source.consent and source.question == QUESTION for source in sources)
    assert all(store.blobs.exists(source.image_digest) for source in sources)
    assert {source.id for source in store.preferences.pending("any")} == {source.id for source in sources}
    # A study's images go with it, also those that were uploaded.
    gone = [gateway.request("DELETE", f"/v1/studies/{source.study}").json() for source in sources]
    assert sum(each["images_deleted"] for each in gone) == 1
    assert not store.blobs.exists(sources[0].image_digest)
    refused = gateway.post("/v1/preference-jobs", {"rows": [ROW | {"study": "s-2"}], "consent": True})
    assert refused.status_code == 410


@pytest.mark.parametrize(
    ("body", "status", "slug"),
    [
        ({"rows": [ROW]}, 403, "consent-missing"),
        ({"rows": [ROW, ROW | {"image": b64(b"no image")}], "consent": True}, 415, "unsupported-image"),
        ({"rows": [ROW, ROW | {"question": ""}], "consent": True}, 422, "invalid-question"),
        ({"rows": [], "consent": True}, 422, "invalid-input"),
        ({"rows": [ROW], "consent": True, "source_ids": []}, 422, "invalid-input"),
        ({"config": {"sead": 1}}, 422, "invalid-input"),
        ({"config": {"degrade": {"mode": "attn_mask"}}}, 422, "invalid-config"),
        ({"config": {"rerank": {"embedder": "/etc"}}}, 422, "invalid-config"),
        ({"then": {"evaluate": {"suite": "/etc/passwd"}}}, 422, "invalid-config"),
        ({"then": {"auto_promote": True}}, 403, "forbidden"),
    ],
)
def test_a_job_that_cannot_be_leaves_nothing_behind(gateway, store, body, status, slug):
    reply = gateway.post("/v1/preference-jobs", body)
    assert (reply.status_code, reply.json()["type"]) == (status, f"/problems/{slug}")
    assert store.jobs.page() == []
    assert store.preferences.pending("any") == []
    assert images_in(store) == set()


def test_operators_submit_fine_tunes_and_evaluations(gateway, store):
    tuned = gateway.post("/v1/finetune-jobs", {"config": {"objective": "sft"}}).json()
    assert store.jobs.get(tuned["id"]).payload["config"]["objective"] == "sft"
    judged = gateway.post("/v1/evaluations", {"adapter": "hscr@aaaaaaaaaaaa"}).json()
    kept = store.jobs.get(judged["id"])
    assert (kept.kind, kept.payload["candidate"]) == (JobKind.SCORE, "hscr@aaaaaaaaaaaa")
    assert gateway.post("/v1/evaluations", {"adapter": "hscr@000000000000"}).status_code == 404
    file = {"adapter": "hscr@aaaaaaaaaaaa", "config": {"suite": "/etc/passwd"}}
    assert gateway.post("/v1/evaluations", file).json()["type"] == "/problems/invalid-config"


def test_promotion_without_a_person_needs_the_installations_consent(serve, store):
    body = {"auto_promote": True}
    assert serve().post("/v1/finetune-jobs", body).json()["type"] == "/problems/forbidden"
    assert serve(auto_promote=True).post("/v1/finetune-jobs", body).status_code == 202


def test_jobs_are_listed_by_kind_and_state(gateway, store):
    made = [gateway.post(path, {}).json()["id"] for path in ("/v1/preference-jobs", "/v1/finetune-jobs")]
    store.jobs.cancel(made[0])

    def listed(**query: str) -> list[str]:
        return [job["id"] for job in gateway.get("/v1/jobs", params=query).json()["data"]]

    assert listed() == made[::-1]
    assert listed(kind="generate") == listed(state="cancelled") == made[:1]
    assert listed(state="queued") == made[1:]


def test_a_job_is_cancelled_once(gateway, store):
    job = gateway.post("/v1/preference-jobs", {}).json()["id"]
    assert gateway.request("DELETE", f"/v1/jobs/{job}").json()["state"] == "cancelled"
    again = gateway.request("DELETE", f"/v1/jobs/{job}")
    assert (again.status_code, again.json()["type"]) == (409, "/problems/conflict")
    running = store.jobs.submit(Job(kind=JobKind.GENERATE))
    claimed = store.jobs.claim(running.id, "worker", LEASE)
    assert gateway.request("DELETE", f"/v1/jobs/{running.id}").json()["cancel_requested"] is True
    assert store.jobs.heartbeat(running.id, claimed.attempt, LEASE) is True


def test_reviewers_cancel_only_their_own(gateway, store):
    one, other, operator = (gateway.key(role) for role in (Role.REVIEWER, Role.REVIEWER, Role.OPERATOR))
    jobs = [gateway.post("/v1/preference-jobs", {}, headers=one).json()["id"] for _ in range(2)]
    assert gateway.request("DELETE", f"/v1/jobs/{jobs[0]}", headers=other).status_code == 403
    assert gateway.request("DELETE", f"/v1/jobs/{jobs[0]}", headers=one).status_code == 200
    assert gateway.request("DELETE", f"/v1/jobs/{jobs[1]}", headers=operator).status_code == 200


def test_what_failed_is_submitted_again_once(gateway, store):
    job = gateway.post("/v1/preference-jobs", {"config": {"seed": 7}}).json()["id"]
    retried = f"/v1/jobs/{job}/retry"
    assert gateway.post(retried, {}).json()["type"] == "/problems/conflict"
    store.jobs.claim(job, "worker", LEASE)
    store.jobs.fail(job, 1, HscrError("It did not survive."))
    replies = [gateway.post(retried, {}) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [202, 202]
    again, same = (reply.json() for reply in replies)
    assert again == same
    assert replies[0].headers["location"] == f"/v1/jobs/{again['id']}"
    assert (again["state"], again["attempt"], again["parent"]) == ("queued", 0, job)
    assert again["payload"] == store.jobs.get(job).payload
    assert store.jobs.get(job).state is JobState.FAILED, "its story stays as it was"
    assert again["id"] in [job_id for _, job_id, _ in store.jobs.due()]
    assert gateway.post("/v1/jobs/job_none/retry", {}).status_code == 404
    other = gateway.key(Role.REVIEWER)
    assert gateway.post(retried, {}, headers=other).status_code == 403


def finish(store, job_id: str) -> None:
    """Claim, report twice, succeed: events 2 to 5 after the submission's own."""
    claimed = store.jobs.claim(job_id, "worker", LEASE)
    for done in (1, 2):
        store.jobs.report(job_id, claimed.attempt, {"done": done, "total": 2})
    with store.jobs.fenced(job_id, claimed.attempt) as connection:
        store.jobs.succeed(connection, job_id, {"records": 2})


def follow(gateway, job_id: str, **headers: str) -> list[tuple[str, str]]:
    with gateway.stream(f"/v1/jobs/{job_id}/events", {}, method="GET", headers=headers) as events:
        return [(identifier, event) for event, _, identifier in events]


def test_a_finished_jobs_story_is_told_and_resumed_after_any_event(gateway, store):
    job = gateway.post("/v1/preference-jobs", {}).json()["id"]
    finish(store, job)
    kinds = ["state", "state", "progress", "progress", "state"]
    whole = [(str(seq), kind) for seq, kind in enumerate(kinds, start=1)]
    assert follow(gateway, job) == whole
    for seen in range(6):
        assert follow(gateway, job, **{"Last-Event-ID": str(seen)}) == whole[seen:]
    bad = gateway.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": "x"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (422, "last-event-id")


def test_a_running_jobs_story_arrives_as_it_happens_and_ends_with_it(gateway, store):
    job = gateway.post("/v1/preference-jobs", {}).json()["id"]
    told: list[tuple[str, str]] = []

    def listen() -> None:
        with gateway.stream(f"/v1/jobs/{job}/events", {}, method="GET") as events:
            for event, _, identifier in events:
                told.append((identifier, event))

    listener = threading.Thread(target=listen)
    listener.start()
    wait_until(lambda: len(told) == 1, what="the first event")
    finish(store, job)
    listener.join(timeout=30)
    assert not listener.is_alive()
    assert [identifier for identifier, _ in told] == ["1", "2", "3", "4", "5"]
