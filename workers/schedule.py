"""Beat: what happens by the clock. It only sends; the control queue's worker acts."""

from typing import Any

from celery.apps import beat
from celery.beat import PersistentScheduler, Service
from celery.platforms import signals

from workers.contract import CHECK_STORE_TASK, CONSIDER_FINETUNE_TASK, CONTROL, SWEEP_TASK, WATCH_CANARY_TASK
from workers.settings import WorkerSettings

SKEW_SECONDS = 60
"""how far the clocks of beat and worker may be apart"""


class SteadyScheduler(PersistentScheduler):  # type: ignore[misc]
    """Celery's own, which shows that it lives, and goes on when the clock is set back instead of waiting."""

    def tick(self, *args: Any, **named: Any) -> float:
        WorkerSettings().show_life()
        ahead = [entry for entry in self.schedule.values() if entry.last_run_at > entry.default_now()]
        for entry in ahead:
            entry.last_run_at = entry.default_now()
        if ahead:
            self._heap = None  # its times are those of the old clock
        return float(super().tick(*args, **named))


class Beat(beat.Beat):  # type: ignore[misc]
    """Celery's own, which ends well whenever it is asked to.

    Celery closes the schedule where the signal meets it. SystemExit then gets lost, as in a class's making,
    of which Python makes another error; and the next tick finds the schedule closed.
    """

    def install_sync_handler(self, service: Service) -> None:
        def end(*_: Any) -> None:
            service.stop()
            raise SystemExit

        signals.update(SIGTERM=end, SIGINT=end)


def beat_schedule(settings: WorkerSettings) -> dict[str, Any]:
    """A tick that nobody took for long is worth nothing, so it expires, by the clocks of two machines."""
    ticks = {
        SWEEP_TASK: settings.sweep_seconds,
        CHECK_STORE_TASK: settings.check_store_seconds,
        CONSIDER_FINETUNE_TASK: settings.consider_seconds,
        WATCH_CANARY_TASK: settings.canary_seconds,
    }
    return {
        name: {
            "task": name,
            "schedule": seconds,
            "options": {"queue": CONTROL, "expires": seconds + SKEW_SECONDS, "retry": False},
        }
        for name, seconds in ticks.items()
    }
