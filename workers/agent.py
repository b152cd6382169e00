"""The agent beside one engine: makes what is loaded agree with what is desired, and says how it stands.

    HSCR_ENGINE_URL=http://127.0.0.1:8100 HSCR_REPLICA_ID=one python -m workers.agent

It is the only process that touches the engine's adapter endpoints. Versions are immutable: one is loaded
under its own name or not at all, after its bytes were checked, and reported after its answers were.
"""

import asyncio
import contextlib
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Collection
from datetime import timedelta
from pathlib import Path

from pydantic import Field
from sqlalchemy.exc import SQLAlchemyError

from hscr.engine import EngineClient, EngineModel, EngineVersion
from hscr.errors import AdapterRefused, Conflict, EngineError, HscrError, Overloaded, StoreError
from hscr.faults import fault_point
from hscr.models.digest import model_digest, template_digest
from hscr.records import AdapterVersion, Replica, now
from hscr.store.store import Store
from workers.adapter_check import check_adapter
from workers.copies import drop_copies
from workers.logs import configure
from workers.probe import check_shift
from workers.settings import WorkerSettings

log = logging.getLogger(__name__)


_AWAY = (StoreError, SQLAlchemyError, OSError)


class AgentSettings(WorkerSettings):
    engine_url: str = Field(default="http://127.0.0.1:8100", description="base URL of the engine beside")
    replica_id: str = Field(default_factory=socket.gethostname, description="this replica's stable name")
    reconcile_seconds: float = Field(default=0.3, gt=0, description="between two looks at what is desired")
    unload_grace_seconds: float = Field(default=3, ge=0, description="after a version became undesired")
    retry_seconds: float = Field(default=5, gt=0, description="before a version that failed is tried again")
    adapter_slots: int = Field(
        default=4,
        ge=3,
        description="adapters in the engine (its --max-loras): active, previous, candidate and a spare",
    )
    ready_file: Path | None = Field(
        default=None, description="exists while the replica has loaded and probed what serves"
    )

    def show_ready(self, *, ready: bool) -> None:
        """Make the ready file or take it away, if one is named."""
        if self.ready_file is None:
            return
        if ready:
            self.ready_file.touch()
        else:
            self.ready_file.unlink(missing_ok=True)


class Agent:
    """Reconciles one engine with the store, one cycle after another."""

    def __init__(self, settings: AgentSettings, store: Store, engine: EngineClient) -> None:
        self._settings = settings
        self._store = store
        self._engine = engine
        self._probed: set[str] = set()
        self._problems: dict[str, str] = {}
        self._retry_at: dict[str, float] = {}
        self._undesired_since: dict[str, float] = {}
        self._ready = False
        self._standing: Replica | None = None
        self._row = asyncio.Lock()  # a report under way must not bring back what was just retired
        self._model_digest = model_digest(settings.model_path)
        self._template_digest = template_digest(settings.model_path)
        self._intended_use = intended_use(settings.model_path)
        self._model = settings.model_path.resolve().name
        self._version = EngineVersion(version="unknown")

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`; no outage of engine or database ends it."""
        self._settings.show_ready(ready=False)  # an earlier agent may have left the file
        # Apart from one another, so that a replica busy with a probe does not pass for dead.
        loops = [asyncio.ensure_future(self._repeat(step)) for step in (self._reconcile, self._report)]
        stopped = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait([*loops, stopped], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*loops, stopped):
                task.cancel()
        for ended in await asyncio.gather(*loops, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        with contextlib.suppress(*_AWAY):
            await asyncio.to_thread(self._store.releases.remove_replica, self._settings.replica_id)
        self._settings.show_ready(ready=False)

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except _AWAY as error:
                log.warning("the store is away: %s", type(error).__name__)
            await asyncio.sleep(self._settings.reconcile_seconds)

    async def _reconcile(self) -> None:
        """One cycle: load what is missing, unload what nobody needs, and take stock."""
        desired = {v.name: v for v in await asyncio.to_thread(self._store.releases.desired)}
        try:
            present = await self._adapters()
            for version in desired.values():
                await self._ensure(version, present)
            await self._remove(present.keys() - desired.keys())
        except EngineError as error:
            # What an engine had loaded is unknown from here on, and gone if it restarted.
            self._probed.clear()
            self._ready = False
            await self._take_stock(problem=error.detail, answers=False)
        else:
            self._forget_problems(desired.keys())
            problem = "; ".join(self._problems.values()) or None
            await self._take_stock(problem=problem, answers=True)

    def _forget_problems(self, desired: Collection[str]) -> None:
        """Of what nobody wants any more; one just found stays a while, for the job that waits to read it."""
        now = time.monotonic()
        for name in [name for name in self._problems if name not in desired]:
            if now > self._retry_at[name]:
                del self._problems[name]

    async def _adapters(self) -> dict[str, str | None]:
        """The adapters in the engine, and the folder each was loaded from.

        Raises EngineError when it serves another base model.
        """
        models = await self._engine.models()
        self._version = await self._engine.version()
        self._model = _base(models)
        stated = self._version.model_digest
        if stated is not None and stated != self._model_digest:
            raise EngineError(
                f"The engine serves model {stated[:12]}, the agent was given {self._model_digest[:12]}.",
                remedy="Start both with the same model folder.",
            )
        present = {model.id: model.root for model in models if model.parent is not None}
        self._probed &= present.keys()
        return present

    async def _ensure(self, version: AdapterVersion, present: dict[str, str | None]) -> None:
        """Load and probe a version unless that is done; remember why not."""
        name = version.name
        if name in self._probed or time.monotonic() < self._retry_at.get(name, 0):
            return
        try:
            await self._load(version, present)
            await self._probe(version, present)
        except EngineError as error:
            if not await self._engine.health():
                raise
            await self._give_up(version, f"{name}: {error.detail}", unfit=False)
        except HscrError as error:
            await self._give_up(version, f"{name}: {error.detail}", unfit=isinstance(error, AdapterRefused))
        except OSError as error:  # the engine's are EngineErrors
            problem = f"{name}: The store cannot be read ({type(error).__name__})."
            await self._give_up(version, problem, unfit=False)
        else:
            fault_point("agent.probed")
            self._probed.add(name)
            self._problems.pop(name, None)
            log.info("%s is loaded and probed", name)

    async def _load(self, version: AdapterVersion, present: dict[str, str | None]) -> None:
        """Have the engine hold the stored files under the version's name. Raises unless they are fit."""
        name = version.name
        if not version.well_named:
            raise AdapterRefused(f"{name!r} is no name of these files.", remedy="Train a new version.")
        folder = (await asyncio.to_thread(self._store.blobs.folder, version.digest)).absolute()
        if present.get(name) == str(folder):
            return  # this agent's work, before it was started again
        base = self._settings.model_path
        await asyncio.to_thread(check_adapter, folder, base, digest=version.digest)
        if name in present:
            await self._unload(name, present)  # somebody's, and of what files is not known
        if len(present) >= self._settings.adapter_slots:
            raise Overloaded(
                f"no slot is free for it: the engine holds {', '.join(sorted(present))}.",
                remedy="Wait for one to be unloaded, or raise HSCR_ADAPTER_SLOTS and the engine's own limit.",
            )
        fault_point("agent.load")
        await self._engine.load_adapter(name, folder)
        fault_point("agent.loaded")
        present[name] = str(folder)

    async def _probe(self, version: AdapterVersion, present: dict[str, str | None]) -> None:
        try:
            await check_shift(self._engine, self._model, version, self._store.blobs)
        except (AdapterRefused, Conflict):
            await self._unload(version.name, present)
            raise

    async def _unload(self, name: str, present: dict[str, str | None]) -> None:
        await self._engine.unload_adapter(name)
        present.pop(name)

    async def _give_up(self, version: AdapterVersion, problem: str, *, unfit: bool) -> None:
        """Say so, and try again later. A version that never served and is unfit is refused everywhere."""
        log.warning("%s", problem)
        self._problems[version.name] = problem
        self._retry_at[version.name] = time.monotonic() + self._settings.retry_seconds
        pointer = await asyncio.to_thread(self._store.releases.pointer)
        if unfit and version.name not in {pointer.active, pointer.previous}:
            await asyncio.to_thread(self._store.releases.refuse, version.name)

    async def _remove(self, undesired: set[str]) -> None:
        """What was undesired for a while: until then a gateway may still send what it has just chosen."""
        since = {name: self._undesired_since.get(name, time.monotonic()) for name in undesired}
        self._undesired_since = since
        before = time.monotonic() - self._settings.unload_grace_seconds
        for name in sorted(name for name in undesired if since[name] <= before):
            if await self._retired(name):
                fault_point("agent.retired")
                await self._engine.unload_adapter(name)
                fault_point("agent.unloaded")
                log.info("%s is unloaded", name)
                await asyncio.to_thread(drop_copies, self._store, older_than=self._settings.keep_temporary)

    async def _retired(self, name: str) -> bool:
        """Whether the replica's row no longer promises the version; it may be desired again by now."""
        seen = timedelta(seconds=self._settings.gateway_seen_seconds)
        async with self._row:
            replica = self._settings.replica_id
            if not await asyncio.to_thread(self._store.releases.retire, replica, name, gateways_seen=seen):
                return False
            self._probed.discard(name)
            if self._standing is not None:
                kept = tuple(other for other in self._standing.loaded if other != name)
                self._standing = self._standing.but(loaded=kept)
            return True

    async def _report(self) -> None:
        async with self._row:
            if self._standing is not None:
                replica = self._standing.but(seen_at=now())
                await asyncio.to_thread(self._store.releases.report_replica, replica)
                self._settings.show_life()
                fault_point("agent.reported")

    async def _take_stock(self, *, problem: str | None, answers: bool) -> None:
        # A version stays reported until `_retired`, desired or not: a release may be counting on it.
        if answers and not self._ready:
            pointer = await asyncio.to_thread(self._store.releases.pointer)
            self._ready = {name for name in (pointer.active, pointer.previous) if name} <= self._probed
        self._standing = Replica(
            id=self._settings.replica_id,
            address=self._settings.engine_url,
            model=self._model,
            model_digest=self._model_digest,
            engine=f"{self._version.engine}/{self._version.version}",
            numeric_mode=self._version.numeric_mode or f"{self._settings.device}/{self._settings.dtype}",
            template_digest=self._template_digest,
            intended_use=self._intended_use,
            loaded=tuple(sorted(self._probed)),
            ready=self._ready and answers,
            problem=problem,
            seen_at=now(),
        )
        self._settings.show_ready(ready=self._standing.ready)


def intended_use(model_path: Path) -> str:
    """The section `Intended use` of the model's own card, or nothing."""
    card = model_path / "README.md"
    if not card.is_file():
        return ""
    found = re.search(r"(?ims)^#+ *intended use\b[^\n]*\n(.*?)(?=^#|\Z)", card.read_text())
    return found[1].strip() if found else ""


def _base(models: list[EngineModel]) -> str:
    bases = [model.id for model in models if model.parent is None]
    if len(bases) != 1:
        raise EngineError(
            f"The engine lists {len(bases)} base models; one is expected.", remedy="Check its address."
        )
    return bases[0]


async def _main() -> None:
    configure()
    settings = AgentSettings()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with Store.open(settings) as store:
        async with EngineClient(settings.engine_url, timeout=30) as engine:
            await Agent(settings, store, engine).run(stop)


def main() -> None:
    """Run until SIGTERM; the replica's row goes with the agent."""
    try:
        asyncio.run(_main())
    except HscrError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
