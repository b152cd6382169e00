"""`make bench-swap`: releases and rollbacks under steady traffic, on several engines and gateways.

Two engines with their agents, two gateways, relay, worker and Redis run as real processes. Clients stream
questions at 80 % of the rate that the system was seen to hold, while versions are released and rolled back,
and one engine is killed in the middle. Which version made an answer is told by its text alone, against what
transformers and PEFT say with it. Every clock starts at the call.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.sabotage import KINDS
from benchmarks.swapping.tally import SETTLED, Change, Tally, changes, percentile, tally
from benchmarks.swapping.traffic import Asked, Traffic
from benchmarks.swapping.versions import Question, versions
from hscr.client import Client
from hscr.config import FinetuneConfig
from hscr.errors import Conflict
from hscr.records import Job, JobState, Replica, Role
from hscr.stack import PHANTOM, Ports, Stack
from hscr.store.database import Database
from hscr.store.releases import BASE
from hscr.store.settings import StoreSettings
from hscr.store.store import Store

LOAD = 0.8
"""share of the measured capacity"""
_STREAMS = 16
_BACK_SECONDS = 180.0
_RANK = f"--max-lora-rank {FinetuneConfig().rank}"
"""as docs/vllm.md has it for production: on a CPU, room for rank 64 costs every answer"""
_SEEN = timedelta(seconds=10)


async def measure(
    options: argparse.Namespace, stack: Stack, store: Store, questions: list[Question]
) -> dict[str, Any]:
    """The whole run against a started stack; the values of the last line."""
    with Client(stack.url, store.keys.create("operator", Role.OPERATOR)[1]) as operator:
        traffic = Traffic(stack.urls, store.keys.create("client", Role.CLIENT)[1], questions)
        run = _Run(operator, stack, store, sabotaged=options.sabotage is not None)
        names = [name for name in questions[0].answers if name != BASE]
        await run.release(names[-1])  # an adapter's answers take longer than the base model's
        await traffic.capacity(_STREAMS, 10)  # warm
        capacity = await traffic.capacity(_STREAMS, options.seconds)
        print(f"  capacity: {capacity:.1f} answers per second at {_STREAMS} streams", flush=True)
        traffic.asked.clear()
        over = asyncio.Event()
        asking = asyncio.create_task(traffic.run(_STREAMS, LOAD * capacity, over))
        steady_from = time.time()
        await asyncio.sleep(options.seconds)
        steady_until = time.time()
        run.calls.clear()
        await run.all(names, options.releases, options.rollbacks)
        await asyncio.sleep(2 * SETTLED)
        over.set()
        await asking
    moves = changes(run.calls, traffic.asked)
    counted = tally(traffic.asked, moves, names[-1], run.killed)
    _explain(traffic.asked, moves)
    return _values(traffic.asked, moves, counted, (steady_from, steady_until), run.killed)


class _Run:
    """The operator's part: one change after another."""

    def __init__(self, operator: Client, stack: Stack, store: Store, *, sabotaged: bool) -> None:
        self.calls: list[tuple[str, str, float, float]] = []
        """kind, version, when it was called for, when the pointer moved"""
        self.killed: list[tuple[float, float]] = []
        self._operator, self._stack, self._store = operator, stack, store
        self._sabotaged = sabotaged

    async def all(self, names: Sequence[str], releases: int, rollbacks: int) -> None:
        every = max(1, releases // max(1, rollbacks))
        following = cycle(names)
        for number in range(1, releases + 1):
            await self.release(next(following))
            if number % every == 0 and number // every <= rollbacks:
                await self._rollback()
            if number == releases // 2:
                await self._kill()

    async def release(self, version: str) -> None:
        called = time.time()
        job = await asyncio.to_thread(self._operator.promote, version, reason="bench-swap", override=True)
        ended = await asyncio.to_thread(self._ended, job.id)
        assert ended.state is JobState.SUCCEEDED, f"the release of {version} failed: {ended.error}"
        flipped, proposed = (one["created_at"] for one in self._store.releases.history(limit=2))
        stages = {"claimed": ended.started_at, "proposed": proposed, "flipped": flipped}
        print(
            "   ", ", ".join(f"{name} {at.timestamp() - called:.2f} s" for name, at in stages.items() if at)
        )
        await self._moved("release", version, called)

    def _ended(self, job_id: str) -> Job:
        for _ in self._operator.follow(job_id):
            pass
        return self._operator.job(job_id)

    async def _rollback(self) -> None:
        called = time.time()
        try:
            pointer = await asyncio.to_thread(self._operator.rollback, reason="bench-swap")
        except Conflict as refused:
            if not self._sabotaged:
                raise
            print(f"  rollback refused: {refused.detail}", flush=True)
            return
        await self._moved("rollback", pointer.active or BASE, called)

    async def _moved(self, kind: str, version: str, called: float) -> None:
        flipped = self._store.releases.history(limit=1)[0]["created_at"].timestamp()
        self.calls.append((kind, version, called, flipped))
        print(f"  {kind} {version}: {time.time() - called:.2f} s", flush=True)
        await asyncio.sleep(2 * SETTLED)  # traffic between two changes, to be judged by

    async def _kill(self) -> None:
        """SIGKILL to one engine; the stack starts it again. Waits until it serves the active version."""
        name = self._stack.engines[-1]
        pid = self._stack.pid(name)
        assert pid is not None
        began = time.time()
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(self._back)
        self.killed.append((began, time.time()))
        print(f"  {name} killed; back after {time.time() - began:.1f} s", flush=True)

    def _back(self) -> None:
        self._await(lambda live: any(not replica.ready for replica in live), "noticed")
        self._await(self._all_serve, "back")

    def _all_serve(self, live: Sequence[Replica]) -> bool:
        active = self._store.releases.pointer().active
        serving = [replica for replica in live if replica.ready and active in {None, *replica.loaded}]
        return len(serving) == len(self._stack.engines)

    def _await(self, condition: Callable[[Sequence[Replica]], bool], what: str) -> None:
        until = time.monotonic() + _BACK_SECONDS
        while not condition(self._store.releases.replicas(seen_within=_SEEN)):
            if time.monotonic() > until:
                raise TimeoutError(f"the killed engine was not {what} after {_BACK_SECONDS:.0f} s")
            time.sleep(0.1)


def _values(
    asked: Sequence[Asked], moves: Sequence[Change], counted: Tally, steady: tuple[float, float],
    killed: Sequence[tuple[float, float]],
) -> dict[str, Any]:  # fmt: skip
    def p99(kind: str) -> float | None:
        taken = [move.reached - move.called for move in moves if move.kind == kind]
        return round(percentile(taken, 0.99), 3) if taken else None

    before = [one.ttft for one in asked if steady[0] <= one.start < steady[1] and one.ttft]
    windows = [(move.called, max(move.flipped, move.reached) + SETTLED) for move in moves]
    during = [
        one.ttft
        for one in asked
        if one.ttft and _within(one.start, windows) and not _within(one.start, killed)
    ]
    return {
        "requests": counted.requests,
        "failed": counted.failed,
        "interrupted_by_kill": counted.interrupted,
        "mixed_version_answers": counted.mixed,
        "stale_answers": counted.stale,
        "publish_s_p99": p99("release"),
        "rollback_s_p99": p99("rollback"),
        "ttft_p99_ratio": round(percentile(during, 0.99) / percentile(before, 0.99), 2),
    }


def _within(moment: float, spans: Sequence[tuple[float, float]]) -> bool:
    return any(start <= moment < end for start, end in spans)


def _explain(asked: Sequence[Asked], moves: Sequence[Change]) -> None:
    """What failed, and how long each change took to reach the last request."""
    failures = Counter(one.failure for one in asked if one.failure)
    print(f"  failures: {dict(failures)}")
    for kind in ("release", "rollback"):
        taken = [move.reached - move.called for move in moves if move.kind == kind]
        if taken:
            print(f"  {kind}: median {statistics.median(taken):.2f} s, longest {max(taken):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=["vllm", "embedded"], default="vllm")
    parser.add_argument("--releases", type=int, default=20)
    parser.add_argument("--rollbacks", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=30, help="of the capacity's and of the steady phase")
    parser.add_argument("--sabotage", choices=KINDS, help="break one promise, to see the count of it rise")
    parser.add_argument("--home", type=Path, help="keep the database, adapters and logs of the run here")
    options = parser.parse_args()
    os.environ.setdefault("HSCR_VLLM_ARGUMENTS", _RANK)
    sabotage = ("-m", "benchmarks.sabotage", options.sabotage) if options.sabotage else ()
    with contextlib.nullcontext(options.home) if options.home else TemporaryDirectory("bench-swap") as home:
        settings = StoreSettings(home=Path(home))
        database = Database(settings.database)
        database.upgrade()
        database.close()
        with Store.open(settings) as store:
            questions = versions(store, PHANTOM, Path(home) / "made", options.adapters, options.questions)
        stack = Stack(
            Path(home),
            ports=Ports(gateway=0),
            engine=options.engine,
            replicas=2,
            gateways=2,
            interpreter=(sys.executable, *sabotage),
        )
        with stack, Store.open(settings) as store:
            print(json.dumps(asyncio.run(measure(options, stack, store, questions))))


if __name__ == "__main__":
    main()
