"""When a canary ends by itself, and how a release job starts one."""

from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest

from hscr.errors import Conflict
from hscr.records import AdapterVersion, Job, JobKind, JobState, Pointer, Replica, VersionCounts, now
from hscr.store.releases import add_adapter
from hscr.store.store import Store
from workers.canary import watch_canary, worse
from workers.contract import ReleasePayload
from workers.gpu import Gpu
from workers.leases import Terms, run_job
from workers.release import release
from workers.rollout import await_loaded
from workers.services import Services
from workers.settings import WorkerSettings

A, B = "hscr@aaaaaaaaaaaa", "hscr@bbbbbbbbbbbb"
WHO = {"actor": "key_1", "reason": "test"}


@pytest.fixture
def services(settings: WorkerSettings, store: Store) -> Services:
    with store.database.write() as connection:
        for name in (A, B):
            add_adapter(
                connection,
                AdapterVersion(
                    name=name, digest=name[5:], base_digest="b", job_id="job_1", config={}, records=0,
                    records_digest="r",
                ),
                [],
            )  # fmt: skip
    report(store, A, B)
    return Services(settings.model_copy(update={"rollout_seconds": 0.5}), store, Gpu(settings))


def report(store: Store, *loaded: str, seen_at: datetime | None = None) -> None:
    standing = Replica(
        id="one", address="http://127.0.0.1:9", model="m", model_digest="d", engine="e/1", ready=True,
        numeric_mode="cpu/float32", template_digest="t", loaded=loaded, seen_at=seen_at or now(),
    )  # fmt: skip
    store.releases.report_replica(standing)


def test_a_replica_that_fell_silent_at_the_flip_is_waited_for(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def looked(*asked: Any) -> object:
        report(services.store, A)
        looks.append(await_loaded(*asked))
        if len(looks) == 1:  # the flip waits for a lock, and in the meantime nobody could say that he lives
            report(services.store, A, seen_at=now() - timedelta(hours=1))
        return looks[-1]

    monkeypatch.setattr("workers.release.await_loaded", looked)
    assert run_release(services, A, None).state is JobState.SUCCEEDED
    assert len(looks) == 2


def test_a_replica_that_stays_silent_ends_the_release(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.release.await_loaded", lambda *_: report(services.store))
    ended = run_release(services, A, None)
    assert ended.state is JobState.FAILED
    assert "is not loaded on one" in (ended.error or {})["detail"]


def run_release(services: Services, version: str | None, share: float | None, **terms: bool) -> Job:
    payload = ReleasePayload(version_name=version, share=share, **{"override": True, **WHO, **terms})  # type: ignore[arg-type]
    job = services.store.jobs.submit(Job(kind=JobKind.RELEASE, payload=payload.stored()))
    run_job(services.store, job.id, partial(release, services), Terms(timedelta(seconds=30), 2, 60))
    return services.store.jobs.get(job.id)


def counts(requests: int, errors: int = 0, seconds: float = 0.1) -> VersionCounts:
    texts = requests - errors
    return VersionCounts(requests=requests, errors=errors, texts=texts, seconds=texts * seconds)


@pytest.mark.parametrize(
    ("candidate", "active", "told"),
    [
        (counts(100), counts(900), None),
        (counts(100, errors=2), counts(900), None),
        (counts(100, errors=3), counts(900), "errors 3.0% of 100 requests; active: 0.0% of 900"),
        (counts(100, errors=12), counts(900, errors=99), None),
        (counts(49, errors=49), counts(900), None),
        (counts(100, errors=100), counts(49), None),
        (counts(100, seconds=0.15), counts(900, seconds=0.1), None),
        (
            counts(100, seconds=0.16),
            counts(900, seconds=0.1),
            "text 0.160 s of 100 requests; active: 0.100 s",
        ),
        (counts(100, seconds=0.01), counts(900, seconds=0.1), None),
        (counts(100, seconds=1.0), counts(900, errors=900), None),
        (VersionCounts(), VersionCounts(), None),
    ],
)
def test_worse_beyond_a_margin_with_enough_requests(
    candidate: VersionCounts, active: VersionCounts, told: str | None
) -> None:
    reason = worse(candidate, active, WorkerSettings())
    assert (reason is None) == (told is None), reason
    assert (told or "") in (reason or "")


def test_a_release_job_with_a_share_starts_a_canary(services: Services) -> None:
    releases = services.store.releases
    assert run_release(services, A, None).state is JobState.SUCCEEDED
    assert run_release(services, B, 0.25).state is JobState.SUCCEEDED
    pointer = releases.pointer()
    assert (pointer.active, pointer.candidate, pointer.share) == (A, B, 0.25)
    assert releases.history(limit=1)[0]["action"] == "canary"
    assert [version.name for version in releases.desired()] == [A, B]
    assert run_release(services, B, None).state is JobState.SUCCEEDED
    assert releases.pointer().but(epoch=0) == Pointer(active=B, previous=A)


def test_a_canary_needs_the_gate_and_every_replica(services: Services) -> None:
    refused = run_release(services, A, 0.25, override=False)
    assert (refused.error or {})["slug"] == "gate-refused"
    report(services.store, B)
    late = run_release(services, A, 0.25)
    assert "one has not loaded" in (late.error or {})["detail"]
    assert (services.store.releases.pointer().share, services.store.releases.pointer().candidate) == (
        0.0,
        None,
    )


def test_another_candidate_begins_without_a_share(services: Services) -> None:
    run_release(services, A, 0.25)
    releases = services.store.releases
    assert releases.propose(A, **WHO).share == 0.25
    assert releases.propose(B, **WHO).share == 0.0


@pytest.mark.parametrize(
    "overtaken", [lambda releases: releases.propose(B, **WHO), lambda releases: releases.end_canary(**WHO)]
)
def test_the_numbers_of_an_earlier_epoch_end_nothing(
    services: Services, overtaken: Callable[..., Pointer]
) -> None:
    releases = services.store.releases
    run_release(services, A, 0.25)
    epoch = releases.pointer().epoch
    bad = {A: counts(100, errors=100), "base": counts(100)}
    releases.report_gateway("g1", epoch=epoch, in_flight={}, canary=bad)
    overtaken(releases)
    assert watch_canary(services) is None
    with pytest.raises(Conflict):
        releases.end_canary(epoch=epoch, **WHO)
    assert releases.history(limit=1)[0]["actor"] == "key_1"


def test_gateways_sum_up_and_a_gone_ones_counts_stay(services: Services) -> None:
    releases = services.store.releases
    run_release(services, A, 0.25)
    epoch = releases.pointer().epoch
    half = {A: counts(30, errors=2), "base": counts(40)}
    for gateway in ("g1", "g2"):
        releases.report_gateway(gateway, epoch=epoch, in_flight={}, canary=half)
        releases.report_gateway(gateway, epoch=epoch, in_flight={}, canary=half)
    releases.remove_gateway("g1")
    assert releases.canary_counts(epoch)[A].requests == 60
    moved = watch_canary(services)
    assert moved is not None
    assert moved.share == 0.0
    assert releases.history(limit=1)[0]["reason"] == "errors 6.7% of 60 requests; active: 0.0% of 80"
