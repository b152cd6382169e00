"""Beat when the clock is set back: Celery's own scheduler would be still for as long as the jump."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from celery.beat import PersistentScheduler

from workers.broker import build
from workers.contract import CHECK_STORE_TASK, SWEEP_TASK
from workers.schedule import SKEW_SECONDS, SteadyScheduler
from workers.settings import WorkerSettings


class Clock:
    """Of the process that runs beat."""

    def __init__(self) -> None:
        self.ahead = timedelta(0)

    def __call__(self) -> datetime:
        return datetime.now().astimezone() + self.ahead


def started(kind: type[PersistentScheduler], folder: Path) -> tuple[PersistentScheduler, Clock, list[str]]:
    """A scheduler that has sent its first ticks, its clock, and what it sends from now on."""
    app, clock, sent = build(WorkerSettings(home=folder)), Clock(), []
    app.now = clock
    scheduler = kind(app, schedule_filename=str(folder / "schedule"))
    for entry in scheduler.schedule.values():
        entry.schedule.nowfun = clock
    scheduler.producer = None  # nothing is connected: what would be sent is noted
    scheduler.sync = lambda: None  # the clock is not to be written to a file
    scheduler.apply_async = lambda entry, **_: sent.append(entry.task)
    return scheduler, clock, sent


def ticked(scheduler: PersistentScheduler) -> None:
    for _ in range(20):
        scheduler.tick()


@pytest.mark.parametrize(("kind", "goes_on"), [(SteadyScheduler, True), (PersistentScheduler, False)])
def test_ticks_go_on_when_the_clock_is_set_back(
    tmp_path: Path, kind: type[PersistentScheduler], goes_on: bool
) -> None:
    scheduler, clock, sent = started(kind, tmp_path)
    clock.ahead = timedelta(hours=2)
    ticked(scheduler)
    assert {SWEEP_TASK, CHECK_STORE_TASK} <= set(sent)
    sent.clear()
    clock.ahead = timedelta(hours=1)
    ticked(scheduler)
    clock.ahead = timedelta(hours=1, seconds=30)
    ticked(scheduler)
    assert (SWEEP_TASK in sent) is goes_on


def test_a_tick_outlives_what_two_hosts_clocks_may_be_apart(tmp_path: Path) -> None:
    app = build(WorkerSettings(home=tmp_path))
    assert all(entry["options"]["expires"] > SKEW_SECONDS for entry in app.conf.beat_schedule.values())
    assert app.conf.beat_scheduler == "workers.schedule:SteadyScheduler"
