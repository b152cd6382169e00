"""Fixtures that more than one part of the suite needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hscr.serving import Serving
from hscr.stack import PHANTOM
from hscr.store.database import Database
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from tests.postgres_server import PostgresServer
from tests.postgres_server import serving as serving_postgres
from tests.redis_server import free_port
from tests.s3_server import S3Server
from tests.serving import EngineProcess

SLOWEST_FIRST = ("workers", "cli", "demo", "engine", "service")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files are dealt to two processes in this order, so that neither is left with a long one at the end."""
    folders = Path(__file__).parent
    rank = {folders / name: place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.parent, len(rank)))


@pytest.fixture
def settings(tmp_path: Path) -> StoreSettings:
    """A home of its own with a migrated SQLite database."""
    settings = StoreSettings(home=tmp_path / "home", database_url=None)
    database = Database(settings.database)
    database.upgrade()
    database.close()
    return settings


@pytest.fixture
def store(settings: StoreSettings) -> Iterator[Store]:
    with Store.open(settings) as opened:
        yield opened


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server that forgets on a power cut, which is nothing to most tests."""
    yield from serving_postgres()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An object store, to ask for a bucket of one's own."""
    server = S3Server(tmp_path_factory.mktemp("s3")).start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def phantom_embedded() -> Iterator[EngineProcess]:
    """The embedded engine, serving the embedded model as "base"."""
    with EngineProcess("embedded", Serving(PHANTOM, "base", free_port())) as running:
        yield running


@pytest.fixture(scope="session")
def phantom_vllm() -> Iterator[EngineProcess]:
    """A real vLLM, serving the embedded model as "base"."""
    with EngineProcess("vllm", Serving(PHANTOM, "base", free_port())) as running:
        yield running
