"""The pointer, the gate before it, and who may unload what."""

from datetime import timedelta

import pytest

from hscr.errors import AdapterRefused, Conflict, GateRefused, NotFound
from hscr.records import (
    AdapterVersion,
    Evaluation,
    GateVerdict,
    Pointer,
    PreferenceRecord,
    Replica,
    Response,
    now,
)
from hscr.store.preferences import add_record
from hscr.store.releases import add_adapter, add_evaluation
from hscr.store.store import Store
from tests.store.make import source

SEEN = timedelta(seconds=10)
WHO = {"actor": "key_1", "reason": "test"}


def adapter(name: str) -> AdapterVersion:
    return AdapterVersion(
        name=name, digest=name.partition("@")[2] * 2, base_digest="b", job_id="job_1", config={}, records=1,
        records_digest="r",
    )  # fmt: skip


def evaluation(candidate: str, verdict: GateVerdict) -> Evaluation:
    return Evaluation(
        candidate=candidate, active=None, suite="s", questions=1, images=1,
        scores={}, differences={}, verdict=verdict, reasons=(),
    )  # fmt: skip


def replica(name: str, *loaded: str) -> Replica:
    return Replica(
        id=name, address="http://127.0.0.1:1", model="m", model_digest="d", engine="e/1",
        numeric_mode="cpu/float32", template_digest="t", loaded=loaded, ready=True, seen_at=now(),
    )  # fmt: skip


def register(store: Store, name: str, verdict: GateVerdict | None = GateVerdict.PASS) -> None:
    with store.database.write() as connection:
        add_adapter(connection, adapter(name), [])
        if verdict is not None:
            add_evaluation(connection, evaluation(name, verdict))


def promote(store: Store, name: str | None, **values: object) -> Pointer:
    return store.releases.promote(name, replicas_seen=SEEN, **{**WHO, **values})  # type: ignore[arg-type]


def test_a_passed_and_loaded_version_is_promoted_and_the_old_one_kept(store: Store) -> None:
    register(store, "a@1")
    store.releases.report_replica(replica("r1", "a@1"))
    moved = promote(store, "a@1")
    assert (moved.active, moved.previous, moved.epoch) == ("a@1", None, 1)
    back = store.releases.rollback(**WHO)
    assert (back.active, back.previous, back.epoch) == (None, "a@1", 2)


@pytest.mark.parametrize("verdict", [None, GateVerdict.FAIL, GateVerdict.INCONCLUSIVE])
def test_what_did_not_pass_is_not_promoted(store: Store, verdict: GateVerdict | None) -> None:
    register(store, "a@1", verdict)
    store.releases.report_replica(replica("r1", "a@1"))
    with pytest.raises(GateRefused, match="override"):
        promote(store, "a@1")
    assert store.releases.pointer().epoch == 0


def test_an_override_is_on_record_with_its_person_and_reason(store: Store) -> None:
    register(store, "a@1", GateVerdict.INCONCLUSIVE)
    store.releases.report_replica(replica("r1", "a@1"))
    promote(store, "a@1", override=True)
    last = store.releases.history()[0]
    assert (last["action"], last["actor"], last["reason"], last["override"]) == (
        "promote",
        "key_1",
        "test",
        True,
    )


def test_nothing_is_promoted_before_every_live_replica_reported_it(store: Store) -> None:
    register(store, "a@1")
    with pytest.raises(Conflict, match="none is live"):
        promote(store, "a@1")
    store.releases.report_replica(replica("r1", "a@1"))
    store.releases.report_replica(replica("r2"))
    with pytest.raises(Conflict, match="not loaded on r2"):
        promote(store, "a@1")
    store.releases.remove_replica("r2")
    assert promote(store, "a@1").active == "a@1"


def test_a_refused_version_is_neither_proposed_nor_desired(store: Store) -> None:
    register(store, "a@1")
    store.releases.propose("a@1", **WHO)
    store.releases.refuse("a@1")
    assert store.releases.desired() == []
    with pytest.raises(Conflict, match="unsafe"):
        store.releases.propose("a@1", **WHO)


def test_desired_are_active_previous_candidate_and_what_jobs_lease(store: Store) -> None:
    for name in ("a@1", "b@2", "c@3", "d@4", "e@5"):
        register(store, name)
    store.releases.report_replica(replica("r1", "a@1", "b@2"))
    promote(store, "a@1")
    promote(store, "b@2")
    store.releases.propose("c@3", **WHO)
    store.releases.lease_version("job_9", "d@4", timedelta(minutes=1))
    store.releases.lease_version("job_8", "e@5", timedelta(seconds=-1))
    assert [version.name for version in store.releases.desired()] == ["b@2", "a@1", "c@3", "d@4"]
    store.releases.lease_version("job_7", "unknown@6", timedelta(minutes=1))
    assert len(store.releases.desired()) == 4, "a lease on what is not registered harms nobody"
    store.releases.release_leases("job_9")
    assert "d@4" not in [version.name for version in store.releases.desired()]


def test_a_version_is_drained_when_every_live_gateway_saw_the_epoch_and_has_none_in_flight(
    store: Store,
) -> None:
    def retired() -> bool:
        return store.releases.retire("r1", "a@1", gateways_seen=SEEN)

    store.releases.propose(None, **WHO)
    store.releases.report_gateway("g1", epoch=1, in_flight={"a@1": 2})
    store.releases.report_gateway("g2", epoch=0, in_flight={})
    assert not retired()
    store.releases.report_gateway("g1", epoch=1, in_flight={})
    assert not retired(), "g2 has not seen the epoch"
    store.releases.report_gateway("g2", epoch=1, in_flight={})
    assert retired()


def test_a_dead_gateway_holds_nothing_back(store: Store) -> None:
    store.releases.report_gateway("g1", epoch=0, in_flight={"a@1": 1})
    assert store.releases.retire("r1", "a@1", gateways_seen=timedelta(seconds=-1))


@pytest.mark.parametrize(
    "name",
    [
        "../hscr@1", "/etc/hscr@1", "hscr/../x@1", "hs\0cr@1", "hscr@1\n", "@1", "hscr", "hscr@", "hscr@1/..",
        "hscr@2", "x" * 65 + "@1", "hscr@" + "1" * 65, ".hidden@1",
    ],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_or_stands_for_other_bytes_is_not_registered(
    store: Store, name: str
) -> None:
    version = adapter("a@1").but(name=name, digest="1" * 64)
    with store.database.write() as connection, pytest.raises(AdapterRefused, match="is no name"):
        add_adapter(connection, version, [])
    assert store.releases.adapters() == []


def test_a_version_leaves_a_replicas_report_only_while_nothing_desires_it(store: Store) -> None:
    register(store, "a@1")
    store.releases.report_replica(replica("r1", "a@1"))
    store.releases.propose("a@1", **WHO)
    assert not store.releases.retire("r1", "a@1", gateways_seen=SEEN), "a release may be counting on it"
    store.releases.propose(None, **WHO)
    store.releases.lease_version("job_1", "a@1", timedelta(minutes=1))
    assert not store.releases.retire("r1", "a@1", gateways_seen=SEEN), "a job leases it"
    store.releases.release_leases("job_1")
    store.releases.report_gateway("g1", epoch=2, in_flight={"a@1": 1})
    assert not store.releases.retire("r1", "a@1", gateways_seen=SEEN), "a gateway answers with it"
    store.releases.report_gateway("g1", epoch=2, in_flight={})
    assert store.releases.retire("r1", "a@1", gateways_seen=SEEN)
    assert [row.loaded for row in store.releases.replicas(seen_within=SEEN)] == [()]
    store.releases.propose("a@1", **WHO)
    with pytest.raises(Conflict, match="not loaded on r1"):
        promote(store, "a@1")


def test_rollback_without_history_is_refused(store: Store) -> None:
    with pytest.raises(Conflict, match="no earlier version"):
        store.releases.rollback(**WHO)


def test_an_unknown_adapter_is_named(store: Store) -> None:
    with pytest.raises(NotFound, match="No adapter x@1"):
        promote(store, "x@1")


def test_deleting_a_study_names_the_adapters_trained_on_it_and_drops_its_records(store: Store) -> None:
    row = source("s1", study="study_1")
    store.preferences.add_sources([row])
    record = PreferenceRecord(
        id="pref_1", image_digest="i", study="study_1", question="q", chosen="c", source="s1", method="hscr",
        rejected=(Response(text="r", similarity=0.5, mean_probability=0.5),),
        model_digest="m", config_digest="k", consent=True,
    )  # fmt: skip
    with store.database.write() as connection:
        assert add_record(connection, record)
        add_adapter(connection, adapter("a@1"), [record])
    adapters, _ = store.preferences.delete_study("study_1", "key_1")
    assert adapters == ["a@1"]
    assert store.preferences.live(method="hscr", limit=10) == []
    store.preferences.add_sources([row])
    assert store.preferences.pending("k") == [], "a deleted study takes nothing new"
    with store.database.write() as connection:
        assert not add_record(connection, record), "a late worker cannot bring it back"
