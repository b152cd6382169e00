"""Beat: what happens by the clock. It only sends; the control queue's worker acts."""

from typing import Any

from workers.contract import CHECK_STORE_TASK, CONSIDER_FINETUNE_TASK, CONTROL, SWEEP_TASK, WATCH_CANARY_TASK
from workers.settings import WorkerSettings


def beat_schedule(settings: WorkerSettings) -> dict[str, Any]:
    """A tick that no worker took before the next one is worth nothing, so it expires."""
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
            "options": {"queue": CONTROL, "expires": max(seconds, 1), "retry": False},
        }
        for name, seconds in ticks.items()
    }
