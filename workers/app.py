"""The Celery application of the workers: one task per kind of job, whose one argument is the job's id.

python -m celery -A workers.app worker --pool=threads --concurrency=4 -Q control,evaluate
python -m celery -A workers.app worker --pool=threads --concurrency=1 -Q generate,score,finetune
python -m celery -A workers.app beat
"""

import logging
import os
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from celery import signals
from celery.platforms import EX_OK
from celery.worker import state

from hscr.errors import HscrError
from hscr.faults import fault_point
from hscr.records import JobKind
from hscr.store.store import Store
from workers.broker import build
from workers.canary import watch_canary
from workers.checkpoints import drop_ended
from workers.contract import (
    CHECK_STORE_TASK,
    CONSIDER_FINETUNE_TASK,
    SWEEP_TASK,
    WATCH_CANARY_TASK,
    task_name,
)
from workers.copies import drop_copies
from workers.evaluate import evaluate
from workers.finetune import finetune
from workers.generate import generate
from workers.gpu import Gpu
from workers.leases import Done, Lease, Terms, run_job
from workers.loop import consider_finetune
from workers.release import release
from workers.score import score
from workers.score_answer import score_answer
from workers.services import Services
from workers.settings import WorkerSettings
from workers.sweep import check_store, sweep

BODIES: dict[JobKind, Callable[[Services, Lease], Done]] = {
    JobKind.GENERATE: generate,
    JobKind.FINETUNE: finetune,
    JobKind.SCORE: score,
    JobKind.SCORE_ANSWER: score_answer,
    JobKind.EVALUATE: evaluate,
    JobKind.RELEASE: release,
}

log = logging.getLogger(__name__)
FORCED = 75
"""exit status of a worker that could not hand back its job: EX_TEMPFAIL of sysexits.h"""
_LOOK_SECONDS = 0.05

settings = WorkerSettings()
app = build(settings)
stopping = threading.Event()


@cache
def services() -> Services:
    """Opened once per worker process, when it starts."""
    return Services(settings, Store.open(settings), Gpu(settings))


def _run(body: Callable[[Services, Lease], Done]) -> Callable[[str], None]:
    def run(job_id: str) -> None:
        present = services()
        terms = Terms(settings.lease, settings.heartbeat_seconds, settings.job_timeout_seconds, stopping)
        run_job(present.store, job_id, partial(body, present), terms)
        drop_ended(present.store)
        drop_copies(present.store, older_than=settings.keep_temporary)

    return run


def _sweep() -> None:
    sweep(services(), app)


def _check_store() -> None:
    check_store(services())


def _consider_finetune() -> None:
    consider_finetune(services())


def _watch_canary() -> None:
    watch_canary(services())


def _open(**_: Any) -> None:
    try:
        services()
    except HscrError as error:
        raise SystemExit(str(error)) from error


@cache
def _look_often(consumer: Any) -> None:
    """Without prefetching, Celery sees that a thread is free when its loop turns: by itself once a second."""
    consumer.timer.call_repeatedly(_LOOK_SECONDS, lambda: None)


def _ready(sender: Any, **_: Any) -> None:
    _look_often(sender)


def _ticking(**_: Any) -> None:
    fault_point("beat.tick")


def _ticked(**_: Any) -> None:
    fault_point("beat.sent")


def _show_life(**_: Any) -> None:
    services().settings.show_life()


def _stop(**_: Any) -> None:
    """Jobs are handed back by those who run them; whoever cannot is not waited for."""
    if stopping.is_set():
        _force("it was asked again")
    stopping.set()
    grace = services().settings.stop_grace_seconds
    timer = threading.Timer(grace, _force, [f"it had not stopped after {grace:g} s"])
    timer.daemon = True
    timer.start()


def _force(reason: str) -> None:
    """End now, the child with it. What was running goes on elsewhere once its lease has expired."""
    log.error("the worker is ended by force: %s", reason)
    services().gpu.abandon()
    os._exit(FORCED)


def _close(**_: Any) -> None:
    services().gpu.close()
    services().store.close()


def _only_one(within_seconds: float) -> None:
    """Let this worker end after its first job, or when none came: a pod of its own for each job."""

    def end(**_: Any) -> None:
        state.should_stop = EX_OK

    idle = threading.Timer(within_seconds, end)
    idle.daemon = True
    signals.worker_ready.connect(lambda **_: idle.start(), weak=False)
    signals.task_prerun.connect(lambda **_: idle.cancel(), weak=False)
    signals.task_postrun.connect(end, weak=False)


for _kind, _body in BODIES.items():
    app.task(_run(_body), name=task_name(_kind))
app.task(_sweep, name=SWEEP_TASK)
app.task(_check_store, name=CHECK_STORE_TASK)
app.task(_consider_finetune, name=CONSIDER_FINETUNE_TASK)
app.task(_watch_canary, name=WATCH_CANARY_TASK)
signals.before_task_publish.connect(_ticking, weak=False)  # only beat sends with this application
signals.after_task_publish.connect(_ticked, weak=False)
signals.worker_init.connect(_open, weak=False)
signals.worker_ready.connect(_ready, weak=False)
signals.heartbeat_sent.connect(_show_life, weak=False)  # every two seconds while the queue is connected
signals.worker_shutting_down.connect(_stop, weak=False)
signals.worker_shutdown.connect(_close, weak=False)
if settings.one_job_seconds is not None:
    _only_one(settings.one_job_seconds)
