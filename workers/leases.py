"""One attempt at one job: claimed, kept by a heartbeat, fenced, and always settled.

The queue decides nothing. A message whose job is done, cancelled or in other hands is dropped here, and an
attempt that lost its lease can write nothing more.
"""

import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, TypeVar

from pydantic import ValidationError
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from hscr.errors import (
    DatabaseUnavailable,
    HscrError,
    InvalidInput,
    JobCancelled,
    LeaseLost,
    ObjectStoreUnavailable,
    StoreError,
    StoreFull,
    StoreReadOnly,
)
from hscr.faults import fault_point
from hscr.records import Job, JobKind, new_id
from hscr.store.store import Store
from workers.contract import Payload

log = logging.getLogger(__name__)

P = TypeVar("P", bound=Payload)
_REPORT_SECONDS = 0.5
_OWNER = f"{socket.gethostname()}:{os.getpid()}:{new_id('worker')[-8:]}"


class AttemptOver(Exception):
    """This attempt cannot go on, but another may: the worker must go, or its child died."""


class StoreInTheWay(AttemptOver):
    """The disk is full or the object store away, which no number of attempts is to be blamed for."""


@dataclass(frozen=True)
class Terms:
    """How leases are kept. `stopping` is set when the worker must go."""

    lease: timedelta
    heartbeat_seconds: float
    timeout_seconds: float
    stopping: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Done:
    """What a job came to. `write` runs in the transaction that ends the job and makes `then` due."""

    result: dict[str, Any]
    then: tuple[Job, ...] = ()
    write: Callable[[Connection], None] = lambda _: None


class Lease:
    """A running attempt, as its body sees it. Enter it to start the heartbeat."""

    def __init__(self, store: Store, job: Job, terms: Terms) -> None:
        self.job = job
        self.holder = f"{job.id}/{job.attempt}"
        self._store = store
        self._terms = terms
        self._reason: Exception | None = None
        self._over = threading.Event()
        self._held: set[str] = set()
        self._reported = 0.0
        self._thread = threading.Thread(target=self._beat, name=f"lease-{job.id}", daemon=True)

    def check(self) -> None:
        """Raises the reason to stop: JobCancelled, LeaseLost, AttemptOver, or HscrError for the time-out."""
        if self._reason is not None:
            raise self._reason
        if self._terms.stopping.is_set():
            raise AttemptOver("the worker is stopping")

    def wait(self, seconds: float) -> None:
        """Let time pass between two looks at something; raises as `check` does."""
        self._terms.stopping.wait(seconds)
        self.check()

    def report(self, done: int, total: int, what: str, **more: Any) -> None:
        """A progress event; at most two a second are kept, and the last one always."""
        self.check()
        if done < total and time.monotonic() - self._reported < _REPORT_SECONDS:
            return
        self._reported = time.monotonic()
        data = {"done": done, "total": total, "what": what, **more}
        self._store.jobs.report(self.job.id, self.job.attempt, data)
        fault_point("attempt.reported")

    def tell(self, message: str) -> None:
        """A line in the job's story."""
        self._store.jobs.tell(self.job.id, self.job.attempt, message)

    def payload(self, kind: type[P]) -> P:
        """What the job is about. Raises InvalidInput for what this version cannot read."""
        try:
            return kind.model_validate(self.job.payload)
        except ValidationError as error:
            # pydantic's message quotes the value, so only the places are told.
            places = sorted({".".join(map(str, each["loc"])) for each in error.errors()})
            raise InvalidInput(
                f"This version cannot read the job's payload: {', '.join(places)}.",
                remedy="Run it by the version that it was submitted to, or submit it anew.",
            ) from error

    @contextmanager
    def fenced(self) -> Iterator[Connection]:
        """A transaction that only this attempt can commit. Raises LeaseLost."""
        with self._store.jobs.fenced(self.job.id, self.job.attempt) as connection:
            yield connection

    def hold(self, version: str | None) -> None:
        """Keep a version loaded on the replicas while this attempt runs."""
        if version is not None:
            self._held.add(version)
            self._renew(version)

    def following(self, kind: JobKind, payload: Payload) -> Job:
        """The job that comes after this one, on behalf of the same key."""
        return Job(kind=kind, payload=payload.stored(), parent=self.job.id, key_id=self.job.key_id)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._held:
            self._store.releases.release_leases(self.holder)

    def _beat(self) -> None:
        started = renewed = time.monotonic()
        while self._reason is None and not self._over.wait(self._terms.heartbeat_seconds):
            try:
                self._renew_all()
                renewed = time.monotonic()
            except LeaseLost as lost:
                self._reason = lost
            except (StoreError, SQLAlchemyError) as error:
                log.warning("%s: heartbeat failed (%s)", self.holder, type(error).__name__)
                if time.monotonic() - renewed > self._terms.lease.total_seconds():
                    self._reason = LeaseLost(f"The lease of {self.holder} ran out.")
            if self._reason is None and time.monotonic() - started > self._terms.timeout_seconds:
                self._reason = _timed_out(self._terms.timeout_seconds)

    def _renew_all(self) -> None:
        if self._store.jobs.heartbeat(self.job.id, self.job.attempt, self._terms.lease):
            self._reason = JobCancelled("The job was cancelled.", remedy="Submit it again if need be.")
        for version in tuple(self._held):
            self._renew(version)

    def _renew(self, version: str) -> None:
        self._store.releases.lease_version(self.holder, version, self._terms.lease)


def run_job(store: Store, job_id: str, body: Callable[[Lease], Done], terms: Terms) -> None:
    """Run `body` under a lease and settle the job, however that ends. Does nothing when the job is taken."""
    if trouble := store.disk.trouble():
        log.warning("%s: not begun, the sweeper sends it again later: %s", job_id, trouble.detail)
        return
    fault_point("attempt.unclaimed")
    job = store.jobs.claim(job_id, _OWNER, terms.lease)
    if job is None:
        log.info("%s: nothing to do for this message", job_id)
        return
    fault_point("attempt.claimed", job.kind)
    try:
        _attempt(store, job, body, terms)
    except LeaseLost:
        log.warning("%s: attempt %d lost its lease and wrote nothing more", job.id, job.attempt)
    except StoreError as error:  # the database takes nothing: the lease runs out, and the sweeper goes on
        log.warning("%s: attempt %d could not be settled (%s)", job.id, job.attempt, error.slug)


def _attempt(store: Store, job: Job, body: Callable[[Lease], Done], terms: Terms) -> None:
    try:
        with _blaming_store(store), Lease(store, job, terms) as lease:
            done = body(lease)
            lease.check()
            fault_point("attempt.done", job.kind)
            with lease.fenced() as connection:
                done.write(connection)
                store.jobs.succeed(connection, job.id, done.result, *done.then)
                fault_point("attempt.written", job.kind)
            fault_point("attempt.succeeded", job.kind)
    except LeaseLost:
        raise
    except AttemptOver as over:
        log.warning("%s: attempt %d ended early: %s", job.id, job.attempt, over)
        fault_point("attempt.handing-back")
        in_the_way = isinstance(over, StoreInTheWay)
        if in_the_way or terms.stopping.is_set():
            store.jobs.hand_back(job.id, job.attempt, str(over), later=in_the_way)
        else:
            store.jobs.attempt_failed(job.id, job.attempt, str(over))
        fault_point("attempt.handed-back")
    except (DatabaseUnavailable, SQLAlchemyError) as error:
        log.warning("%s: the database failed (%s)", job.id, type(error).__name__)
        store.jobs.attempt_failed(job.id, job.attempt, f"the database failed ({type(error).__name__})")
    except HscrError as error:
        log.info("%s: %s", job.id, error.slug)
        fault_point("attempt.failing")
        store.jobs.fail(job.id, job.attempt, error)
        fault_point("attempt.failed")
    except Exception as error:  # noqa: BLE001  a job always ends in a state that its owner can read
        # The message itself may quote what it was about, so only the place is logged.
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s: unexpected %s\n%s", job.id, type(error).__name__, frames)
        store.jobs.attempt_failed(job.id, job.attempt, f"an unexpected {type(error).__name__}")


@contextmanager
def _blaming_store(store: Store) -> Iterator[None]:
    """What fails because a store is in the way is tried again.

    Whatever fails while the disk is full may fail because of that, also in the child.
    """
    try:
        yield
    except (LeaseLost, JobCancelled, AttemptOver):
        raise
    except (StoreFull, StoreReadOnly, ObjectStoreUnavailable) as error:
        raise StoreInTheWay(error.detail) from error
    except Exception as error:
        trouble = store.disk.trouble()
        if trouble is None:
            raise
        raise StoreInTheWay(trouble.detail) from error


def _timed_out(seconds: float) -> HscrError:
    return HscrError(
        f"The job ran longer than {seconds:g} s and was stopped.",
        remedy="Give it less to do, or raise HSCR_JOB_TIMEOUT_SECONDS.",
    )
