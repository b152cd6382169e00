"""Promotion through the gate, rollback, lineage and forgetting."""

import pytest

from hscr.records import Evaluation, GateVerdict, JobKind, PreferenceRecord, Response, Role
from hscr.store.preferences import add_record
from hscr.store.releases import add_adapter, add_evaluation
from service.examples import EXAMPLES
from service.schemas import Outcomes
from tests.service.conftest import VERSIONS, adapter, replica
from tests.stored import images_in
from tests.waiting import wait_until

A, B = VERSIONS


def judge(store, version: str, verdict: GateVerdict) -> Evaluation:
    evaluation = Evaluation(
        candidate=version, active=None, suite="phantom", questions=300, images=100,
        scores={}, differences={}, verdict=verdict, reasons=("test",),
    )  # fmt: skip
    with store.database.write() as connection:
        add_evaluation(connection, evaluation)
    return evaluation


@pytest.mark.parametrize("verdict", [None, GateVerdict.FAIL, GateVerdict.INCONCLUSIVE])
def test_what_did_not_pass_is_refused(gateway, store, verdict):
    if verdict is not None:
        judge(store, A, verdict)
    refused = gateway.post(f"/v1/adapters/{A}/promote", {"reason": "please"})
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/gate-refused")
    assert "override" in refused.json()["remedy"]
    assert store.jobs.page() == []


def test_what_passed_is_released_by_a_job(gateway, store):
    judge(store, A, GateVerdict.FAIL)
    passed = judge(store, A, GateVerdict.PASS)
    reply = gateway.post(f"/v1/adapters/{A}/promote", {"reason": "passed"})
    assert reply.status_code == 202
    job = store.jobs.get(reply.json()["id"])
    assert job.kind is JobKind.RELEASE
    wanted = {"version_name": A, "evaluation_id": passed.id, "reason": "passed", "override": False}
    assert wanted.items() <= job.payload.items()
    assert store.releases.pointer().active is None  # the worker flips it, once every replica has it


def test_an_override_is_on_record_under_the_callers_key(gateway, store):
    key, secret = store.keys.create("chief", Role.OPERATOR)
    body, headers = {"reason": "demo", "override": True}, {"Authorization": f"Bearer {secret}"}
    reply = gateway.post(f"/v1/adapters/{A}/promote", body, headers=headers)
    payload = store.jobs.get(reply.json()["id"]).payload
    assert (payload["override"], payload["actor"], payload["reason"]) == (True, key.id, "demo")
    assert gateway.post(f"/v1/adapters/{A}/promote", {"override": True}, headers=headers).status_code == 422


def test_promotions_that_make_no_sense(gateway, store):
    why = {"reason": "test", "override": True}
    assert gateway.post("/v1/adapters/hscr@000000000000/promote", why).status_code == 404
    assert gateway.post("/v1/adapters/base/promote", why).status_code == 409
    judged = judge(store, B, GateVerdict.PASS)
    other = gateway.post(f"/v1/adapters/{A}/promote", {"reason": "x", "evaluation_id": judged.id})
    assert (other.status_code, other.json()["type"]) == (409, "/problems/conflict")
    store.releases.refuse(A)
    assert gateway.post(f"/v1/adapters/{A}/promote", why).status_code == 409
    gateway.serve_version(B)
    assert gateway.post("/v1/adapters/base/promote", {"reason": "back"}).status_code == 202


def test_a_rollback_flips_the_pointer_and_is_on_record(gateway, store):
    nothing = gateway.post("/v1/adapters/rollback", {"reason": "why not"})
    assert (nothing.status_code, nothing.json()["type"]) == (409, "/problems/conflict")
    gateway.serve_version(A)
    gateway.serve_version(B)
    told = gateway.post("/v1/adapters/rollback", {"reason": "worse"}).json()
    assert (told["active"], told["previous"]) == (A, B)
    latest = store.releases.history(limit=1)[0]
    assert (latest["action"], latest["actor"], latest["reason"]) == ("rollback", "local", "worse")


def test_a_rollback_to_what_no_replica_has_is_refused(gateway, store, engine):
    gateway.serve_version(A)
    gateway.serve_version(B)
    store.releases.report_replica(replica(engine.address, loaded=(B,)))
    models = lambda: {model["id"] for model in gateway.get("/v1/models").json()["data"]}  # noqa: E731
    wait_until(lambda: models() == {"tiny", B}, what="the loss of the version")
    refused = gateway.post("/v1/adapters/rollback", {"reason": "worse"})
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/conflict")
    assert store.releases.pointer().active == B


def test_adapters_say_where_they_stand(gateway, store):
    gateway.serve_version(A)
    listed = gateway.get("/v1/adapters").json()
    assert listed["pointer"]["active"] == A
    standing = {each["name"]: (each["active"], each["loaded_on"]) for each in listed["data"]}
    assert standing == {A: (True, ["engine-0"]), B: (False, ["engine-0"])}


def test_the_answers_behind_an_evaluation_are_read(gateway, store):
    outcome = EXAMPLES[Outcomes].model_dump(mode="json")["hscr@3f9c2a7b1d4e"]
    judged = EXAMPLES[Evaluation].but(id="eval_9")
    with store.database.write() as connection:
        add_evaluation(connection, judged, {A: outcome, "base": []})
    assert gateway.get("/v1/evaluations/eval_9/outcomes").json() == {A: outcome, "base": []}


def test_evaluations_are_read(gateway, store):
    one, other = judge(store, A, GateVerdict.PASS), judge(store, B, GateVerdict.FAIL)
    assert gateway.get(f"/v1/evaluations/{one.id}").json() == one.model_dump(mode="json")
    assert [each["id"] for each in gateway.get("/v1/evaluations").json()["data"]] == [other.id, one.id]
    only = gateway.get("/v1/evaluations", params={"candidate": A}).json()["data"]
    assert [each["id"] for each in only] == [one.id]


def learn(store, source: str, study: str, version: str) -> PreferenceRecord:
    """A record made of the source, and a version trained on it."""
    record = PreferenceRecord(
        id=f"pref_{version}", image_digest="i", study=study, question="q?", chosen="a stone.",
        rejected=(Response(text="no.", similarity=0.5, mean_probability=0.5),), source=source,
        method="hscr", model_digest="m", config_digest="c", consent=True,
    )  # fmt: skip
    with store.database.write() as connection:
        assert add_record(connection, record)
        add_adapter(connection, adapter(version), [record])
    return record


def test_the_whole_lineage_and_its_deletion(gateway, store):
    judged = judge(store, A, GateVerdict.PASS)
    gateway.serve_version(A)
    client, reviewer = gateway.key(Role.CLIENT, train_consent=True), gateway.key(Role.REVIEWER)
    operator = gateway.key(Role.OPERATOR)
    asked = gateway.ask(headers=client, study="s-9").json()
    given = {"answer_id": asked["id"], "verdict": "correct", "correction": "a stone."}
    feedback = gateway.post("/v1/feedback", given, headers=reviewer).json()
    record = learn(store, feedback["id"], "s-9", "hscr@cccccccccccc")

    told = gateway.get(f"/v1/answers/{asked['id']}/lineage", headers=client).json()
    assert told["answer"] == asked
    assert told["image"]["digest"] == asked["image"]["digest"]
    assert told["image_stored"] is True
    assert told["adapter"]["name"] == A
    assert [each["id"] for each in told["evaluations"]] == [judged.id]
    assert [(change["action"], change["override"]) for change in told["promotions"]] == [("promote", True)]
    assert [each["id"] for each in told["feedback"]] == [feedback["id"]]
    assert told["preferences"] == [record.id]
    assert told["used_by"] == ["hscr@cccccccccccc"]
    listed = gateway.get("/v1/preferences", headers=reviewer).json()["data"]
    assert [each["id"] for each in listed] == [record.id]

    gone = gateway.request("DELETE", "/v1/studies/s-9", headers=operator).json()
    assert gone == {
        "study": "s-9", "images_deleted": 1, "adapters_trained_on_it": ["hscr@cccccccccccc"],
    }  # fmt: skip
    assert gateway.get(f"/v1/answers/{asked['id']}", headers=client).status_code == 410
    assert gateway.ask(headers=client, study="s-9").status_code == 410
    assert store.preferences.page() == []
    assert images_in(store) == set()


def test_the_lineage_of_the_base_model_has_no_adapter(gateway):
    answer = gateway.answered()
    told = gateway.get(f"/v1/answers/{answer.id}/lineage").json()
    assert (told["adapter"], told["trained_on"], told["promotions"]) == (None, [], [])
