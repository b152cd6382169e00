"""Beat: what happens by the clock. It only sends; the control queue's worker acts."""

from typing import Any

from celery.beat import PersistentScheduler

from workers.contract import CONSIDER_FINETUNE_TASK, CONTROL, SWEEP_TASK, WATCH_CANARY_TASK
from workers.settings import WorkerSettings


class Scheduler(PersistentScheduler):  # type: ignore[misc]
    """Celery's own, which shows at each tick that it lives."""

    def tick(self, **options: Any) -> float:
        WorkerSettings().show_life()
        return float(super().tick(**options))


def beat_schedule(settings: WorkerSettings) -> dict[str, Any]:
    """A tick that no worker took before the next one is worth nothing, so it expires."""
    ticks = {
        SWEEP_TASK: settings.sweep_seconds,
        CONSIDER_FINETUNE_TASK: settings.consider_seconds,
        WATCH_CANARY_TASK: settings.canary_seconds,
    }
    return {
        name: {
            "task": name,
            "schedule": seconds,
            "options": {"queue": CONTROL, "expires": max(seconds, 1), "retry": False},
        }
        for name, seconds in ticks.items()
    }
