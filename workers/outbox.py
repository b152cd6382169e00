"""The relay: sends what is due in the outbox to the queue, by name and id, for as long as it lives.

    python -m workers.outbox

A message may go twice (a crash between sending and marking) and may be lost by the queue; the lease and the
sweeper make both harmless.
"""

import logging
import signal
import sys
import threading
from collections.abc import Callable
from itertools import chain, repeat

from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy.exc import SQLAlchemyError

from hscr.errors import HscrError, StoreError
from hscr.faults import fault_point
from hscr.store.store import Store
from workers.broker import build
from workers.contract import QUEUE_OF, task_name
from workers.logs import configure
from workers.settings import WorkerSettings

log = logging.getLogger(__name__)

_BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0)
_AT_ONCE = 100
"""entries that one look takes"""


def relay(
    store: Store,
    app: Celery,
    stop: threading.Event,
    *,
    every_seconds: float,
    on_sent: Callable[[], None] = lambda: None,
) -> None:
    """Send until `stop`, and call `on_sent` whenever all that was due is sent.

    A queue or database that is away is waited for.
    """
    backoff = _backoff()
    while not stop.is_set():
        try:
            while send_due(store, app) == _AT_ONCE and not stop.is_set():
                pass  # more may be due than one look takes; what comes meanwhile shares the next look
        except (OperationalError, StoreError, SQLAlchemyError) as error:
            log.warning("cannot send: %s; trying again", type(error).__name__)
            stop.wait(next(backoff))
        else:
            backoff = _backoff()
            on_sent()
            stop.wait(every_seconds)


def send_due(store: Store, app: Celery) -> int:
    """Send what is due in order, at most `_AT_ONCE`; returns how many.

    Raises OperationalError when the queue is away.
    """
    due = store.jobs.due(_AT_ONCE)
    if not due:
        return 0
    sent: list[int] = []
    try:
        with app.producer_or_acquire() as producer:
            for entry, job_id, kind in due:
                fault_point("relay.due")
                queue = QUEUE_OF[kind]
                app.send_task(task_name(kind), [job_id], queue=queue, retry=False, producer=producer)
                fault_point("relay.sent")
                sent.append(entry)
    finally:
        if sent:
            store.jobs.mark_sent(sent)
            fault_point("relay.marked")
    return len(sent)


def _backoff() -> chain[float]:
    return chain(_BACKOFF_SECONDS, repeat(_BACKOFF_SECONDS[-1]))


def main() -> None:
    configure()
    settings = WorkerSettings()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        with Store.open(settings) as store:
            every = settings.relay_seconds
            relay(store, build(settings), stop, every_seconds=every, on_sent=settings.show_life)
    except HscrError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
