"""The workers' application, whose beat is sent SIGTERM at the moment that `ENDED_AT` names."""

import os
import signal
from typing import Any

from celery import signals

from workers.app import app
from workers.schedule import SteadyScheduler

__all__ = ["app"]


class _Ending:
    """SystemExit, raised while a class with it is made, comes out of there as a RuntimeError (until 3.12)."""

    def __set_name__(self, owner: type, name: str) -> None:
        end()


def end(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def make_class(**_: Any) -> None:
    type("Made", (), {"ending": _Ending()})


def open_schedule(scheduler: SteadyScheduler) -> Any:
    end()
    return super(SteadyScheduler, scheduler)._open_schedule()


match os.environ["ENDED_AT"]:
    case "making a class within a tick":
        signals.before_task_publish.connect(make_class)
    case "opening the schedule":
        SteadyScheduler._open_schedule = open_schedule
