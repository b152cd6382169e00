"""What one running gateway holds: opened in the lifespan, closed there, reached through the app's state."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from hscr.records import Job
from hscr.store.jobs import Asked
from hscr.store.store import Store
from service.engines import EnginePool
from service.entrance import entrance
from service.findings import LastFindings
from service.limits import Admission
from service.metrics import Metrics
from service.pointer import PointerWatcher
from service.security import Authenticator
from service.settings import GatewaySettings
from service.threads import Threads, Together


@dataclass
class Leaving:
    """Whether this copy was asked to stop: it still answers, but should be asked no more."""

    begun: bool = False


@dataclass(frozen=True)
class State:
    """`db` runs store calls and `images` decodes, each in its own bounded threads; `submit` keeps jobs."""

    settings: GatewaySettings
    metrics: Metrics
    store: Store
    db: Threads
    submit: Together[Asked, Job]
    images: Threads
    engines: EnginePool
    pointer: PointerWatcher
    findings: LastFindings
    admission: Admission
    authenticator: Authenticator
    study_key: bytes
    leaving: Leaving


@asynccontextmanager
async def opened(settings: GatewaySettings, metrics: Metrics, leaving: Leaving) -> AsyncIterator[State]:
    """Raises SchemaOutdated, StoreError when the database cannot be used."""
    async with AsyncExitStack() as stack:
        db, images = Threads(settings.store_threads, "store"), Threads(settings.image_threads, "images")
        stack.callback(db.close)
        stack.callback(images.close)
        store = stack.enter_context(await db(Store.open, settings))
        door = entrance(store, db)
        stack.push_async_callback(door.close)
        engines = EnginePool(settings, metrics)
        stack.push_async_callback(engines.close)
        pointer = PointerWatcher(store, engines, settings)
        stack.push_async_callback(pointer.close)
        await pointer.start()
        metrics.watch_pointer(lambda: pointer.pointer.epoch, lambda: pointer.age)
        findings = LastFindings(store.blobs, db)
        metrics.watch_store(
            lambda: pointer.trouble is None,
            {
                "image": lambda: len(findings.found.lost_images),
                "adapter": lambda: len(findings.found.lost_adapters),
            },
        )
        yield State(
            settings=settings,
            metrics=metrics,
            store=store,
            db=db,
            submit=Together(door.submit_all),
            images=images,
            engines=engines,
            pointer=pointer,
            findings=findings,
            admission=Admission(settings.max_in_flight, engines.retry_after),
            authenticator=Authenticator(Together(door.verify_all), store, db, settings),
            study_key=settings.study_key(),
            leaving=leaving,
        )
