"""A share of the traffic on the candidate: who gets it, what is counted, and how it ends."""

from collections.abc import Iterator
from datetime import timedelta
from functools import partial

import pytest

from hscr.records import GateVerdict, JobKind, Pointer, VersionCounts
from hscr.store.releases import add_adapter, canary_in
from service.canary import diverted
from tests.service.conftest import FOREVER, IMAGE, QUESTION, VERSIONS, Gateway, adapter, b64, replica
from tests.service.scripted import Exchange, ScriptedEngine, agrees, breaks_off, fails, falls_silent, scripted
from tests.service.test_promotion import judge
from tests.waiting import wait_until
from workers.canary import watch_canary
from workers.gpu import Gpu
from workers.services import Services
from workers.settings import WorkerSettings

A, B = VERSIONS
STUDIES = [f"s-{number}" for number in range(12)]
SEEN = timedelta(seconds=FOREVER)


def start_canary(gateway: Gateway, version: str, share: float) -> Pointer:
    with gateway.store.database.write() as connection:
        pointer = canary_in(
            connection, version, share, actor="test", reason="test", override=True, replicas_seen=SEEN
        )
    gateway.epoch_seen()
    return pointer


def draws(pointer: Pointer, studies: list[str]) -> dict[str, bool]:
    """As a gateway draws for the keyless caller."""
    return {study: diverted(pointer, f"local\0{study}") for study in studies}


def some(pointer: Pointer, *, candidate: bool, number: int) -> list[str]:
    """Studies that the draw sends to the candidate, or to the active version."""
    drawn = draws(pointer, [f"n-{n}" for n in range(1000)])
    return [study for study, chosen in drawn.items() if chosen is candidate][:number]


def test_the_draw_is_stable_grows_with_the_share_and_differs_between_candidates():
    keys = [f"key_1\0study-{number}" for number in range(4000)]
    drawn = lambda share, name: {  # noqa: E731
        key for key in keys if diverted(Pointer(candidate=name, share=share), key)
    }
    assert [key[-1] for key in keys[:10] if key in drawn(0.3, A)] == KNOWN, "other copies draw the same"
    assert 0.08 < len(drawn(0.1, A)) / len(keys) < 0.12
    assert drawn(0.1, A) < drawn(0.3, A)
    assert drawn(0.3, A) != drawn(0.3, B)
    assert drawn(0.0, A) == set()
    assert not diverted(Pointer(share=0.5), keys[0])


KNOWN = ["0", "7", "9"]
"""Of the first ten keys: computed once, so that a hash that varies between processes would show."""


def test_a_share_of_the_studies_goes_to_the_candidate_and_stays_there(gateway):
    gateway.serve_version(A)
    pointer = start_canary(gateway, B, 0.5)
    expected = {study: B if drawn else A for study, drawn in draws(pointer, STUDIES).items()}
    assert set(expected.values()) == {A, B}
    for options in ({}, {"adapter": "active"}, {}):
        served = {study: gateway.answered(study=study, **options).provenance.adapter for study in STUDIES}
        assert served == expected
    for named in (A, B):
        assert {gateway.answered(study=s, adapter=named).provenance.adapter for s in STUDIES} == {named}
    assert {gateway.answered(study=s, adapter="base").provenance.adapter for s in STUDIES} == {None}
    (study,) = some(pointer, candidate=True, number=1)
    lineage = gateway.get(f"/v1/answers/{gateway.answered(study=study).id}/lineage").json()
    assert [change["action"] for change in lineage["promotions"]] == ["canary"]


def test_without_a_study_the_image_is_drawn(gateway):
    gateway.serve_version(A)
    pointer = start_canary(gateway, B, 0.5)
    first = gateway.answered()
    drawn = diverted(pointer, f"local\0{first.image.digest}")
    assert first.provenance.adapter == (B if drawn else A)
    assert gateway.answered(question="what is shown?").provenance.adapter == first.provenance.adapter


def test_a_candidate_that_no_replica_has_gets_nothing(gateway, store, engine):
    gateway.serve_version(A)
    pointer = start_canary(gateway, B, 0.5)
    store.releases.report_replica(replica(engine.address, loaded=(A,)))
    lost = lambda: B not in {model["id"] for model in gateway.get("/v1/models").json()["data"]}  # noqa: E731
    wait_until(lost, what="the loss of the candidate")
    for study in some(pointer, candidate=True, number=3):
        assert gateway.answered(study=study).provenance.adapter == A


@pytest.fixture
def engine_of_scripts(store) -> Iterator[ScriptedEngine]:
    with store.database.write() as connection:
        for name in VERSIONS:
            add_adapter(connection, adapter(name), [])
    with scripted() as engine:
        store.releases.report_replica(replica(engine.address))
        yield engine


def only(version: str, then, exchange: Exchange):
    """`then` happens to requests for the version, an answer to all others."""
    return then(exchange) if exchange.model == version else agrees(exchange)


def counted(gateway: Gateway, version: str) -> VersionCounts:
    releases = gateway.store.releases
    return releases.canary_counts(releases.pointer().epoch).get(version, VersionCounts())


def test_each_copys_outcomes_are_summed_by_version(serve, engine_of_scripts):
    one, other = serve(), serve()
    one.serve_version(A)
    pointer = start_canary(one, B, 0.5)
    other.epoch_seen()
    mine, theirs = some(pointer, candidate=True, number=2), some(pointer, candidate=False, number=3)
    for gateway in (one, other):
        for study in (*mine, *theirs):
            assert gateway.ask(study=study, stream=study == mine[0]).status_code == 200
    wait_until(lambda: counted(one, B).requests == 4 and counted(one, A).requests == 6, what="the counts")
    assert (counted(one, B).errors, counted(one, B).texts) == (0, 4)
    assert counted(one, B).seconds > 0
    told = one.get("/v1/adapters").json()["canary"]
    assert {version: counts["requests"] for version, counts in told.items()} == {A: 6, B: 4}


def test_failures_of_the_engine_are_counted_and_nothing_else(serve, engine_of_scripts):
    gateway = serve(circuit_failures=1000)
    gateway.serve_version(A)
    (study,) = some(start_canary(gateway, B, 0.5), candidate=True, number=1)
    engine_of_scripts.script = partial(only, B, fails)
    assert gateway.ask(study=study).status_code == 503
    wait_until(lambda: counted(gateway, B) == VersionCounts(requests=1, errors=1), what="a failure")
    engine_of_scripts.script = breaks_off
    assert "engine-interrupted" in gateway.ask(study=study, stream=True).text
    wait_until(lambda: counted(gateway, B).errors == 2, what="a failure in the middle")
    assert (counted(gateway, B).requests, counted(gateway, B).texts) == (2, 1)
    engine_of_scripts.script = falls_silent
    with gateway.stream("/v1/vqa", {"image": b64(IMAGE), "question": QUESTION, "study": study}) as events:
        assert next(events)[0] == "delta"
    wait_until(lambda: gateway.metric("hscr_aborted_total") == 1, what="the client's leaving")
    engine_of_scripts.script = agrees
    assert gateway.ask(study=study).status_code == 200
    wait_until(lambda: counted(gateway, B).requests == 4, what="both more")
    assert counted(gateway, B).errors == 2


def test_a_candidate_that_fails_loses_its_share_by_itself_and_on_record(serve, engine_of_scripts, store):
    gateway = serve(circuit_failures=1000)
    gateway.serve_version(A)
    pointer = start_canary(gateway, B, 0.5)
    mine, theirs = some(pointer, candidate=True, number=5), some(pointer, candidate=False, number=5)
    settings = WorkerSettings(home=gateway.settings.home, canary_min_requests=5)
    services = Services(settings, store, Gpu(settings))
    engine_of_scripts.script = partial(only, B, fails)
    assert [gateway.ask(study=study).status_code for study in theirs] == [200] * 5
    assert [gateway.ask(study=study).status_code for study in mine[:4]] == [503] * 4
    wait_until(lambda: counted(gateway, B).requests == 4, what="four outcomes")
    assert watch_canary(services) is None, "too few to judge"
    assert gateway.ask(study=mine[4]).status_code == 503
    wait_until(lambda: counted(gateway, B).requests == 5, what="five outcomes")
    moved = watch_canary(services)
    assert moved is not None
    assert (moved.active, moved.candidate, moved.share) == (A, B, 0.0)
    latest = store.releases.history(limit=1)[0]
    assert (latest["action"], latest["actor"]) == ("end-canary", "canary")
    assert latest["reason"] == "errors 100.0% of 5 requests; active: 0.0% of 5"
    gateway.epoch_seen()
    assert [gateway.answered(study=study).provenance.adapter for study in mine] == [A] * 5
    assert watch_canary(services) is None


def test_a_canary_is_started_by_a_release_job_on_the_terms_of_a_promotion(gateway, store):
    body = {"share": 0.1, "reason": "first a tenth"}
    refused = gateway.post(f"/v1/adapters/{A}/canary", body)
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/gate-refused")
    passed = judge(store, A, GateVerdict.PASS)
    reply = gateway.post(f"/v1/adapters/{A}/canary", body)
    assert reply.status_code == 202
    job = store.jobs.get(reply.json()["id"])
    assert job.kind is JobKind.RELEASE
    wanted = {"version_name": A, "evaluation_id": passed.id, "share": 0.1, "override": False}
    assert wanted.items() <= job.payload.items()
    assert gateway.post("/v1/adapters/base/canary", body).status_code == 409
    assert gateway.post("/v1/adapters/hscr@000000000000/canary", body).status_code == 404
    for share in (0, 1, -0.1):
        assert gateway.post(f"/v1/adapters/{A}/canary", body | {"share": share}).status_code == 422


def test_a_person_ends_a_canary_at_once(gateway, store):
    gateway.serve_version(A)
    none = gateway.post("/v1/adapters/end-canary", {"reason": "why not"})
    assert (none.status_code, none.json()["type"]) == (409, "/problems/conflict")
    start_canary(gateway, B, 0.5)
    assert gateway.get("/v1/adapters").json()["pointer"]["share"] == 0.5
    told = gateway.post("/v1/adapters/end-canary", {"reason": "seen enough"}).json()
    assert (told["active"], told["candidate"], told["share"]) == (A, B, 0.0)
    latest = store.releases.history(limit=1)[0]
    assert (latest["actor"], latest["reason"]) == ("local", "seen enough")


def test_a_rollback_and_a_promotion_end_a_canary(gateway):
    gateway.serve_version(A)
    gateway.serve_version(B)
    start_canary(gateway, A, 0.5)
    told = gateway.post("/v1/adapters/rollback", {"reason": "worse"}).json()
    assert (told["active"], told["candidate"], told["share"]) == (A, None, 0.0)
    start_canary(gateway, B, 0.5)
    gateway.serve_version(B)
    assert (gateway.store.releases.pointer().share, gateway.store.releases.pointer().active) == (0.0, B)
