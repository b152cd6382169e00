"""`make bench-jobs`: how fast work is accepted for good, and whether any of it is lost when processes die.

Gateways, PostgreSQL (fsync on), Redis, relay, workers and beat run as real processes on the same cores as the
load. Each submission is a preference job about no source, `{"source_ids": []}`: a worker claims it, looks its
sources up, writes under its lease, reports and ends it, all of what any job of its kind does but the model's
work, which would only make the numbers those of a model. First one gateway's greatest rate is found, then
its time to a 202 is measured at half of it, sent at random moments whatever the answers, then processes are
killed while all gateways are asked.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import httpx2

from benchmarks.quantile import quantile
from benchmarks.submitting.books import count, unfinished
from benchmarks.submitting.load import Clients, Submission
from benchmarks.submitting.stand import Stand
from hscr.client import Client
from hscr.errors import HscrError
from hscr.records import JobEvent, Role
from hscr.store.database import Database
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from tests.postgres_server import programs

_CONCURRENCIES = (8, 16, 32, 64)
_GOAL = 500
"""a second, at least; at half of it the time to a 202 can be compared from one version to the next"""
_FOLLOWED = 25
_AGAIN = 200
_DRAIN_SECONDS = 1200.0
_RANDOM = random.SystemRandom()

Stories = dict[str, list[JobEvent]]
Values = dict[str, float | int]


def fsync_floor(folder: Path, times: int = 500) -> list[float]:
    """Milliseconds of one write of 8 kB (a page of the log) and its fdatasync, sorted."""
    taken = []
    page = os.urandom(8192)
    with (folder / "fsync").open("wb", buffering=0) as file:
        file.write(page * 64)
        os.fsync(file.fileno())
        for number in range(times):
            began = time.perf_counter()
            os.pwrite(file.fileno(), page, number % 64 * 8192)
            os.fdatasync(file.fileno())
            taken.append(1000 * (time.perf_counter() - began))
    return sorted(taken)


async def steady(clients: Clients, rate: float, seconds: float) -> list[Submission]:
    """What was sent at this rate for so long."""
    first, over = len(clients.sent), asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, over.set)
    await clients.open(rate, over)
    return clients.sent[first:]


async def waited(clients: Clients, rate: float, seconds: float, store: Store) -> float:
    """The time to a 202 of all but one in a hundred, in milliseconds; afterwards all jobs have ended."""
    times = [1000 * (submission.seconds or 0) for submission in await steady(clients, rate, seconds)]
    p99 = quantile(times, 0.99)
    print(
        f"  at {rate:.0f} a second: p50 {statistics.median(times):.1f} ms, "
        f"p90 {quantile(times, 0.9):.1f} ms, p99 {p99:.1f} ms, "
        f"longest {max(times):.1f} ms of {len(times)}", flush=True,
    )  # fmt: skip
    await _drained(store)
    return p99


async def killing(stand: Stand, clients: Clients, rate: float, kills: int, every: float) -> list[Submission]:
    """What was sent while processes were killed at random moments."""
    first, over = len(clients.sent), asyncio.Event()
    sending = asyncio.create_task(clients.open(rate, over))
    for number in range(kills):
        await asyncio.sleep(every * _RANDOM.uniform(0.5, 1.5))
        name = await asyncio.to_thread(stand.kill)
        print(f"  kill {number + 1}: {name}, {len(clients.sent) - first} submitted", flush=True)
    await asyncio.sleep(2 * every)
    over.set()
    await sending
    return clients.sent[first:]


async def followed(stand: Stand, secret: str, jobs: asyncio.Queue[str], told: Stories) -> None:
    """Follow jobs over HTTP, one after another, through whatever dies meanwhile."""
    while True:
        job = await jobs.get()
        told[job] = await asyncio.to_thread(_story, stand, secret, job)
        jobs.task_done()


def _story(stand: Stand, secret: str, job: str) -> list[JobEvent]:
    told: list[JobEvent] = []
    for attempt in range(1000):
        url = f"http://127.0.0.1:{stand.ports[attempt % len(stand.ports)]}"
        with suppress(httpx2.HTTPError, HscrError), Client(url, secret) as client:
            told.extend(client.follow(job, after=told[-1].seq if told else 0))
            return told
        time.sleep(1)
    return told


async def measure(options: argparse.Namespace, stand: Stand, store: Store, secret: str) -> Values:
    """The whole run against a started stand; the values of the last line."""
    clients = Clients(stand.ports[:1], secret)
    await clients.closed(8, options.warm)
    rates = {number: await clients.closed(number, options.seconds) for number in _CONCURRENCIES}
    for number, rate in rates.items():
        print(f"  {rate:7.1f} accepted per second by {number} clients at once", flush=True)
    most = max(rates.values())
    await _drained(store)

    p99 = await waited(clients, most / 2, options.seconds, store)
    await waited(clients, _GOAL / 2, options.seconds, store)

    clients.ports = stand.ports
    told: Stories = {}
    queue: asyncio.Queue[str] = asyncio.Queue()
    followers = [asyncio.create_task(followed(stand, secret, queue, told)) for _ in range(2)]
    began = time.monotonic()
    killed = asyncio.create_task(killing(stand, clients, options.kill_rate, options.kills, options.every))
    while not killed.done():
        await asyncio.sleep(1)
        with suppress(IndexError):
            recent = _RANDOM.choice(clients.sent[-50:])
            if recent.job is not None and queue.qsize() < _FOLLOWED:
                queue.put_nowait(recent.job)
    survived = await killed
    seconds = time.monotonic() - began
    waits = [submission.seconds or 0 for submission in survived]
    print(
        f"  {len(survived)} accepted in {seconds:.0f} s with {stand.kills.total()} kills "
        f"({', '.join(f'{name} {number}' for name, number in sorted(stand.kills.items()))}); "
        f"the longest wait for a 202, tries included, {max(waits):.1f} s", flush=True,
    )  # fmt: skip
    await _drained(store)
    await queue.join()
    for follower in followers:
        follower.cancel()
    return {
        **await _settled(clients, store, told),
        "submit_p99_ms": round(p99, 1),
        "per_second": round(most, 1),
        "kills": stand.kills.total(),
    }


async def _settled(clients: Clients, store: Store, told: Stories) -> Values:
    books = await asyncio.to_thread(count, store, clients.sent)
    heard = sum(store.jobs.events(job) == events for job, events in told.items())
    repeated = _RANDOM.sample(clients.sent, min(_AGAIN, len(clients.sent)))
    same = sum([await clients.again(submission) == submission.job for submission in repeated])
    print(f"  {asdict(books)}")
    print(
        f"  followed over HTTP while processes died: {heard} of {len(told)} jobs' stories whole and in order"
    )
    print(f"  asked again with their key: {same} of {len(repeated)} got the job they had", flush=True)
    return {
        "submitted": books.submitted,
        "accepted": books.accepted,
        "lost": books.lost + len(repeated) - same,
        "duplicated": books.duplicated,
    }


async def _drained(store: Store) -> None:
    """Wait until the workers have ended everything that was accepted."""
    began, waiting = time.monotonic(), await asyncio.to_thread(unfinished, store)
    left = waiting
    while left:
        if time.monotonic() - began > _DRAIN_SECONDS:
            print(f"  {left} jobs have not ended after {_DRAIN_SECONDS:.0f} s", flush=True)
            return
        await asyncio.sleep(0.5)
        left = await asyncio.to_thread(unfinished, store)
    seconds = time.monotonic() - began
    if waiting:
        print(
            f"  {waiting} jobs were still to be run, {waiting / max(seconds, 0.5):.0f} a second", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-jobs", description=__doc__)
    parser.add_argument("--gateways", type=int, default=2, help="one is measured, all are killed")
    parser.add_argument("--worker-threads", type=int, default=8)
    parser.add_argument("--warm", type=float, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--every", type=float, default=3, help="mean seconds between two kills")
    parser.add_argument("--kill-rate", type=float, default=_GOAL / 4, help="submissions a second meanwhile")
    options = parser.parse_args()
    gc.disable()  # what was sent is remembered, and looking through it stops the load for 90 ms
    if programs() is None:
        raise SystemExit("PostgreSQL is not installed: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="hscr-jobs-") as folder:
        home = Path(folder)
        home.chmod(0o711)  # the database's own user passes through
        with Stand(home, gateways=options.gateways, worker_threads=options.worker_threads) as stand:
            print(f"  load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
            floor = fsync_floor(home)
            print(
                f"  floor: one fdatasync of 8 kB {quantile(floor, 0.5):.2f} ms, "
                f"p99 {quantile(floor, 0.99):.2f} ms",
                flush=True,
            )
            settings = StoreSettings(home=home, database_url=stand.postgres.url("hscr"))
            database = Database(settings.database)
            database.upgrade()
            database.close()
            with Store.open(settings) as store:
                secret = store.keys.create("bench", Role.REVIEWER)[1]
                stand.start()
                values = asyncio.run(measure(options, stand, store, secret))
            print(f"  load after: {os.getloadavg()[0]:.1f}")
    print(json.dumps(values))


if __name__ == "__main__":
    main()
