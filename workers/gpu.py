"""The parent of one warm child process that owns torch and the model.

A thread of a Celery worker cannot be killed, a process can: the child is its own session, so that a cancel or
a time-out ends it and whatever it started. Requests and stop messages go in by its standard input as JSON
lines, events come back by a pipe of their own; what libraries print goes to the worker's log.
"""

import contextlib
import json
import logging
import os
import select
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import hscr.errors
from hscr.errors import HscrError
from workers.leases import AttemptOver
from workers.settings import WorkerSettings

log = logging.getLogger(__name__)

Event = dict[str, Any]

_POLL_SECONDS = 0.2
_TERM_SECONDS = 2.0
_FINAL = {"result", "error"}
_SIGN_OF_LIFE = "alive"


class Gpu:
    """Runs one task at a time in the child, which is started when needed and stopped when idle."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._idle: threading.Timer | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the living child."""
        child = self._child
        return child.pid if child is not None and child.alive else None

    def run(
        self,
        task: str,
        arguments: dict[str, Any],
        *,
        on_event: Callable[[Event], None],
        check: Callable[[], None],
    ) -> dict[str, Any]:
        """Run a task and return its result; `check` is called several times a second and raises to stop it.

        Raises what `check` or `on_event` raised, the HscrError that the task raised, or AttemptOver when the
        child died, fell silent or met an error that nobody foresaw. Such a child is not used again.
        """
        with self._lock:
            self._cancel_idle()
            child = self._ready_child()
            try:
                final = self._follow(child, task, arguments, on_event, check)
            finally:
                self._start_idle()
        if final["event"] == "error":
            raise _error(final)
        return dict(final["result"])

    def close(self) -> None:
        """Stop the child, if any."""
        with self._lock:
            self._cancel_idle()
            self._drop()

    def abandon(self) -> None:
        """Kill the child where it stands, whoever waits for it: this process ends at once."""
        child = self._child
        if child is not None and child.alive:
            os.killpg(child.pid, signal.SIGKILL)

    def _follow(
        self,
        child: "_Child",
        task: str,
        arguments: dict[str, Any],
        on_event: Callable[[Event], None],
        check: Callable[[], None],
    ) -> Event:
        try:
            number = child.request(task, arguments, check)
            for event in child.events(number):
                if event is not None and event["event"] in _FINAL:
                    if event.get("unforeseen"):
                        self._drop()
                    return event
                check()
                if event is not None and event["event"] != _SIGN_OF_LIFE:
                    on_event(event)
        except _Silent:
            self._drop()
            raise
        except AttemptOver:
            self._stop(child, self._settings.checkpoint_grace_seconds, checkpoint=True)
            raise
        except Exception:
            self._stop(child, self._settings.child_grace_seconds)
            raise
        raise AssertionError("a child's events end with a final one or its death")

    def _stop(self, child: "_Child", seconds: float, *, checkpoint: bool = False) -> None:
        """Ask, and wait a moment; then kill. A child that obeys stays warm."""
        if not (child.alive and child.stops(seconds, checkpoint=checkpoint)):
            self._drop()

    def _ready_child(self) -> "_Child":
        if self._child is None or not self._child.alive:
            self._drop()
            self._child = _Child(self._settings)
        return self._child

    def _drop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _start_idle(self) -> None:
        self._idle = threading.Timer(self._settings.child_idle_seconds, self._stop_idle)
        self._idle.daemon = True
        self._idle.start()

    def _cancel_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _stop_idle(self) -> None:
        # A task that began while the timer fired holds the lock: its own timer comes later.
        if self._lock.acquire(blocking=False):
            try:
                self._drop()
            finally:
                self._lock.release()


class _Silent(AttemptOver):
    """It neither dies nor works; asking it to stop would be waste of time."""


class _Child:
    """One `python -m workers.gpu_child` and its two pipes."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._number = 0
        self._buffer = b""
        self._events, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "workers.gpu_child", *_options(settings, theirs)],
                stdin=subprocess.PIPE,
                pass_fds=(theirs,),
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        assert self._process.stdin is not None
        self._requests = self._process.stdin.fileno()
        os.set_blocking(self._requests, False)  # a child that does not read must not hold up its parent
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._events, selectors.EVENT_READ)
        self.pid = self._process.pid
        log.info("GPU child %d started", self.pid)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def request(self, task: str, arguments: dict[str, Any], check: Callable[[], None]) -> int:
        """Send a task; returns its number. Raises AttemptOver."""
        self._number += 1
        self._send(
            {"id": self._number, "task": task, "arguments": arguments},
            self._settings.child_silence_seconds,
            check,
        )
        return self._number

    def events(self, number: int) -> Iterator[Event | None]:
        """Events of task `number` as they come, None while there is none.

        Raises AttemptOver at its death, or when it has been silent for too long.
        """
        heard = time.monotonic()
        while True:
            if not self._selector.select(_POLL_SECONDS):
                if time.monotonic() - heard > self._settings.child_silence_seconds:
                    seconds = self._settings.child_silence_seconds
                    raise _Silent(f"the GPU child showed no progress for {seconds:g} s")
                yield None
                continue
            heard = time.monotonic()
            data = os.read(self._events, 1 << 16)
            if not data:
                raise AttemptOver(f"the GPU child died ({_fate(self._process.wait())})")
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if event["id"] == number:
                    yield event

    def stops(self, seconds: float, *, checkpoint: bool) -> bool:
        """Ask the latest task to stop, and before to keep what it has if it can; whether it did in time."""
        until = time.monotonic() + seconds
        with contextlib.suppress(AttemptOver):
            self._send({"stop": self._number, "checkpoint": checkpoint}, seconds)
            for event in self.events(self._number):
                if event is not None and event["event"] in _FINAL:
                    return True
                if time.monotonic() > until:
                    return False
        return False

    def kill(self) -> None:
        """End the child's whole process group: SIGTERM, then SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_TERM_SECONDS)
        self._selector.close()
        os.close(self._events)
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        log.info("GPU child %d ended: %s", self.pid, _fate(self._process.returncode))

    def _send(
        self, message: dict[str, Any], seconds: float, check: Callable[[], None] = lambda: None
    ) -> None:
        data = json.dumps(message).encode() + b"\n"
        until = time.monotonic() + seconds
        try:
            while data:
                check()
                if select.select([], [self._requests], [], _POLL_SECONDS)[1]:
                    data = data[os.write(self._requests, data) :]
                elif time.monotonic() > until:
                    raise _Silent(f"the GPU child took no request for {seconds:g} s")
        except (BrokenPipeError, ConnectionResetError) as error:
            raise AttemptOver(f"the GPU child died ({_fate(self._process.wait())})") from error


def _options(settings: WorkerSettings, events: int) -> list[str]:
    options = {
        "events": events,
        "model": settings.model_path,
        "device": settings.device,
        "dtype": settings.dtype,
        "threads": settings.torch_threads,
        "home": settings.home,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def _fate(code: int | None) -> str:
    if code is None:
        return "still running"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _error(event: Event) -> Exception:
    if event.get("unforeseen"):
        return AttemptOver(event["detail"])
    kind = getattr(hscr.errors, event["kind"])
    error: HscrError = kind(event["detail"], remedy=event["remedy"])
    return error
