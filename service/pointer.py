"""Which version serves, as this copy last saw it, and what it has in flight on each.

The order carries the promise that no version is unloaded under a request: a version is chosen and counted in
one step of the event loop, and a heartbeat counts only after the epoch it reports has replaced the old one.
So "epoch seen, 0 in flight" can never precede a request that chose by an older epoch.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from time import monotonic

from hscr.errors import Conflict, StoreError
from hscr.faults import fault_point
from hscr.records import Pointer, Replica, new_id
from hscr.store.releases import BASE
from hscr.store.store import Store
from service.canary import Tally, diverted
from service.engines import EnginePool
from service.logs import log, where
from service.settings import GatewaySettings
from service.threads import Threads

ACTIVE = "active"
"""What a request may call the version that serves now."""


class PointerStale(StoreError):
    """This copy has not seen the pointer lately, so it does not know what is loaded."""

    slug = "pointer-stale"
    title = "This copy of the gateway has lost its view of the database"


class PointerWatcher:
    """Polls the pointer and the replicas, and reports this copy's heartbeat, in a thread of its own."""

    def __init__(self, store: Store, engines: EnginePool, settings: GatewaySettings) -> None:
        self.pointer = Pointer()
        self.tally = Tally()
        self.trouble: StoreError | None = None
        self._id = new_id("gateway")
        self._store = store
        self._engines = engines
        self._settings = settings
        self._in_flight: Counter[str] = Counter()
        self._fresh_at = -float("inf")
        self._thread = Threads(1, "pointer")  # never queued behind the requests' own calls
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises StoreError, SchemaOutdated when the first look fails."""
        await self.refresh()
        self._task = asyncio.create_task(self._poll(), name="pointer")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        try:
            await self._thread(self._store.releases.remove_gateway, self._id)
        except Exception as error:  # noqa: BLE001 - the heartbeat expires by itself
            log().warning("gateway_not_removed", error=type(error).__name__)
        self._thread.close()

    async def refresh(self) -> None:
        """See the disk, the pointer and the replicas, then say so."""
        began = monotonic()
        self.trouble = await self._thread(self._store.disk.trouble)
        pointer, replicas, desired = await self._thread(self._look)
        # In this order: the new pointer may name what only the new view of the replicas has loaded.
        await self._engines.refresh(replicas, desired)
        if pointer.epoch != self.pointer.epoch:
            self.tally = Tally()
        self.pointer = pointer
        fault_point("pointer.seen")
        in_flight = {version: count for version, count in self._in_flight.items() if count}
        await self._thread(
            self._store.releases.report_gateway,
            self._id,
            epoch=pointer.epoch,
            in_flight=in_flight,
            canary=self.tally.counts if pointer.share else None,
        )
        self._fresh_at = began

    @property
    def age(self) -> float:
        """Seconds since the last whole refresh began."""
        return monotonic() - self._fresh_at

    def require_fresh(self) -> None:
        """Raises PointerStale; StoreFull, StoreReadOnly while an answer could not be kept."""
        if self.trouble is not None:
            raise self.trouble.with_traceback(None)  # told again and again
        if self.age > self._settings.pointer_stale:
            raise PointerStale(
                "The database could not be read lately, so nothing is admitted here.",
                remedy="Try again shortly; if it lasts, `hscr doctor` looks for the cause.",
            )

    @contextmanager
    def hold(self, wanted: str | None, sticky: str) -> Iterator[str | None]:
        """Choose a version and count the caller on it until the block ends. Yields None for the base model.

        `wanted` is None or `active`, `base`, or the name of a version the pointer keeps loaded. Of those who
        want what is active, a canary's share, drawn by `sticky`, gets the candidate. Raises PointerStale;
        Conflict for a version that is not kept loaded.
        """
        self.require_fresh()
        version = self._choose(wanted, sticky)
        self._in_flight[version or BASE] += 1
        try:
            yield version
        finally:
            self._in_flight[version or BASE] -= 1

    def _choose(self, wanted: str | None, sticky: str) -> str | None:
        if wanted in (None, ACTIVE):
            return self._drawn(sticky)
        if wanted == BASE:
            return None
        if wanted not in {self.pointer.active, self.pointer.previous, self.pointer.candidate}:
            raise Conflict(
                f"{wanted} is not kept loaded now.",
                remedy="Ask `active`, `base`, or a version that GET /v1/models lists.",
            )
        return wanted

    def _drawn(self, sticky: str) -> str | None:
        candidate = self.pointer.candidate
        if diverted(self.pointer, sticky) and self._engines.serving(candidate):
            return candidate
        return self.pointer.active

    def _look(self) -> tuple[Pointer, list[Replica], list[str]]:
        releases = self._store.releases
        seen = timedelta(seconds=self._settings.replicas_seen)
        desired = [version.name for version in releases.desired()]
        return releases.pointer(), releases.replicas(seen_within=seen), desired

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._settings.pointer_poll)
            try:
                await self.refresh()
            except StoreError as error:
                log().warning("pointer_not_seen", error=error.slug, age=round(self.age, 1))
            except Exception as error:  # noqa: BLE001 - a passing fault of the database must not end the watch
                kind = type(error).__name__
                log().warning("pointer_not_seen", error=kind, age=round(self.age, 1), at=where(error))
