"""The gateway as an ASGI application: settings in, nothing global."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from hscr import __version__
from service import docs, errors
from service.metrics import Metrics
from service.middleware import Account, BodyLimit, LastResort
from service.routes import (
    adapters,
    answers,
    captions,
    chat,
    evaluations,
    feedback,
    health,
    jobs,
    models,
    preferences,
    studies,
    vqa,
)
from service.schemas import NOTICE
from service.settings import GatewaySettings
from service.state import Leaving, opened

_ROUTES = (
    vqa, captions, chat, models, answers, feedback, preferences, jobs, adapters, evaluations, studies, health,
)  # fmt: skip

_TAGS = [
    {"name": "asking", "description": "Questions and captions about medical images. Research use only."},
    {"name": "answers", "description": "Kept answers, their provenance and lineage."},
    {"name": "learning", "description": "Judgements of answers, and preference records made from them."},
    {"name": "jobs", "description": "Long work: durable once accepted, cancellable, with a story."},
    {"name": "adapters", "description": "Trained versions and which of them serves."},
    {"name": "evaluations", "description": "What the gate measured and said."},
    {"name": "studies", "description": "Forgetting."},
    {"name": "health", "description": "For probes, scrapers and readers of errors."},
]


def create_app(settings: GatewaySettings, leaving: Leaving | None = None) -> FastAPI:
    """The state opens and closes with the app's lifespan. Raises in it SchemaOutdated, StoreError."""
    metrics = Metrics()
    leaving = leaving or Leaving()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with opened(settings, metrics, leaving) as state:
            app.state.gateway = state
            yield

    app = FastAPI(
        title="HSCR gateway",
        version=__version__,
        description=f"Medical vision-language models that keep aligning themselves. {NOTICE}",
        openapi_tags=_TAGS,
        docs_url=None,  # the stock pages load their scripts from a CDN
        redoc_url=None,
        lifespan=lifespan,
    )
    errors.install(app)
    for routes in _ROUTES:
        app.include_router(routes.router)
    docs.describe(app)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(LastResort)
    app.add_middleware(Account, metrics=metrics)
    return app
