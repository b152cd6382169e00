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
from typing import Any, Self

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from hscr.errors import DatabaseUnavailable, HscrError, JobCancelled, LeaseLost, StoreError
from hscr.records import Job, JobKind, new_id
from hscr.store.jobs import MAX_ATTEMPTS
from hscr.store.store import Store
from workers.contract import Payload

log = logging.getLogger(__name__)

_REPORT_SECONDS = 0.5
_OWNER = f"{socket.gethostname()}:{os.getpid()}:{new_id('worker')[-8:]}"


class AttemptOver(Exception):
    """This attempt cannot go on, but another may: the worker must go, or its child died."""


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
    job = store.jobs.claim(job_id, _OWNER, terms.lease)
    if job is None:
        log.info("%s: nothing to do for this message", job_id)
        return
    try:
        _attempt(store, job, body, terms)
    except LeaseLost:
        log.warning("%s: attempt %d lost its lease and wrote nothing more", job.id, job.attempt)


def _attempt(store: Store, job: Job, body: Callable[[Lease], Done], terms: Terms) -> None:
    try:
        with Lease(store, job, terms) as lease:
            done = body(lease)
            lease.check()
            with lease.fenced() as connection:
                done.write(connection)
                store.jobs.succeed(connection, job.id, done.result, *done.then)
    except LeaseLost:
        raise
    except AttemptOver as over:
        _hand_back(store, job, over, counted=not terms.stopping.is_set())
    except (DatabaseUnavailable, SQLAlchemyError) as error:
        failed = AttemptOver(f"the database failed ({type(error).__name__})")
        _hand_back(store, job, failed, counted=True)
    except HscrError as error:
        log.info("%s: %s", job.id, error.slug)
        store.jobs.fail(job.id, job.attempt, error)
    except Exception as error:  # noqa: BLE001  a job always ends in a state that its owner can read
        # The message itself may quote what it was about, so only the place is logged.
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s: unexpected %s\n%s", job.id, type(error).__name__, frames)
        store.jobs.fail(job.id, job.attempt, _unexpected(error))


def _hand_back(store: Store, job: Job, over: AttemptOver, *, counted: bool) -> None:
    log.warning("%s: attempt %d ended early: %s", job.id, job.attempt, over)
    if counted and job.attempt >= MAX_ATTEMPTS:
        parked = HscrError(
            f"The job did not survive {job.attempt} attempts; the last: {over}.",
            remedy="Read the worker's log for the cause, then submit the job again.",
        )
        store.jobs.fail(job.id, job.attempt, parked)
    else:
        store.jobs.hand_back(job.id, job.attempt, str(over))


def _timed_out(seconds: float) -> HscrError:
    return HscrError(
        f"The job ran longer than {seconds:g} s and was stopped.",
        remedy="Give it less to do, or raise HSCR_JOB_TIMEOUT_SECONDS.",
    )


def _unexpected(error: Exception) -> HscrError:
    return HscrError(
        f"The job met an unexpected {type(error).__name__}.",
        remedy="The worker's log shows where; submit the job again once the cause is gone.",
    )
