"""When a turn of the loop is due."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from hscr.records import Job, JobKind, JobState
from hscr.store.store import Store
from tests.workers.harness import add_sources
from workers.app import app
from workers.contract import FinetunePayload, GeneratePayload
from workers.gpu import Gpu
from workers.loop import Situation, consider_finetune, due, within_hours
from workers.schedule import beat_schedule
from workers.services import Services
from workers.settings import WorkerSettings

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
SETTINGS = WorkerSettings(finetune_threshold=10, finetune_min_interval_seconds=3600)


def situation(**changes: Any) -> Situation:
    given: dict[str, Any] = {"moment": NOON, "last": None, "new_sources": 10, "busy": False}
    return Situation(**{**given, **changes})


def turn(age: timedelta) -> Job:
    return Job(kind=JobKind.GENERATE, created_at=NOON - age)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (situation(), True),
        (situation(new_sources=9), False),
        (situation(busy=True), False),
        (situation(last=turn(timedelta(minutes=59))), False),
        (situation(last=turn(timedelta(minutes=60))), True),
    ],
    ids=["due", "too few", "busy", "too soon", "long enough ago"],
)
def test_a_turn_is_due(now: Situation, *, expected: bool) -> None:
    assert due(now, SETTINGS) is expected


def test_a_turn_waits_for_its_hours() -> None:
    night = SETTINGS.model_copy(update={"finetune_from_hour": 22, "finetune_until_hour": 6})
    assert not due(situation(), night)
    assert due(situation(moment=NOON.replace(hour=23)), night)


@pytest.mark.parametrize(
    ("hour", "start", "end", "inside"),
    [
        (0, 0, 24, True), (23, 0, 24, True), (8, 9, 17, False), (9, 9, 17, True), (17, 9, 17, False),
        (23, 22, 6, True), (5, 22, 6, True), (6, 22, 6, False), (12, 22, 6, False),
    ],
)  # fmt: skip
def test_hours(hour: int, start: int, end: int, *, inside: bool) -> None:
    assert within_hours(hour, start, end) is inside


@pytest.fixture
def services(settings: WorkerSettings, store: Store) -> Services:
    changed = settings.model_copy(update={"finetune_threshold": 4, "finetune_min_interval_seconds": 0})
    return Services(changed, store, Gpu(changed))


def test_new_consented_sources_start_one_turn(services: Services) -> None:
    store = services.store
    add_sources(store, 3)
    assert consider_finetune(services) is None
    add_sources(store, 1, start=3)

    job = consider_finetune(services)

    assert job is not None
    payload = GeneratePayload.model_validate(job.payload)
    assert payload.then == FinetunePayload(auto_promote=False)
    assert consider_finetune(services) is None, "one is queued already"
    assert store.jobs.count(JobState.QUEUED) == 1


def test_old_sources_start_no_second_turn(services: Services) -> None:
    store = services.store
    add_sources(store, 4)
    first = consider_finetune(services)
    assert first is not None
    store.jobs.cancel(first.id)
    assert consider_finetune(services) is None
    add_sources(store, 4, start=4)
    second = consider_finetune(services)
    assert second is not None
    assert second.id != first.id


def test_sources_without_consent_do_not_count(services: Services) -> None:
    sources = add_sources(services.store, 3)
    services.store.preferences.add_sources([sources[0].but(id="src_none", consent=False)])
    assert consider_finetune(services) is None


def test_the_worker_knows_every_tick_that_beat_sends(settings: WorkerSettings) -> None:
    assert {entry["task"] for entry in beat_schedule(settings).values()} <= set(app.tasks)


def test_ticks_expire_before_they_pile_up(settings: WorkerSettings) -> None:
    for entry in beat_schedule(settings).values():
        assert entry["options"]["queue"] == "control"
        assert entry["options"]["expires"] >= entry["schedule"]
