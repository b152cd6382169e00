"""Real queues, real worker processes, short leases."""

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from hscr.store.store import Store
from tests.redis_server import RedisServer
from tests.tiny_llava import build
from tests.workers.harness import FAST, Processes, migrated
from workers.settings import WorkerSettings

_databases = count(1)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA."""
    return build(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def settings(tmp_path: Path, redis_server: RedisServer, tiny: Path) -> WorkerSettings:
    url = redis_server.url(next(_databases))
    return migrated(WorkerSettings(home=tmp_path / "home", redis_url=url, model_path=tiny, **FAST))


@pytest.fixture
def store(settings: WorkerSettings) -> Iterator[Store]:
    with Store.open(settings) as opened:
        yield opened


@pytest.fixture
def processes(tmp_path: Path, settings: WorkerSettings) -> Iterator[Processes]:
    folder = tmp_path / "logs"
    folder.mkdir()
    started = Processes(folder, settings)
    yield started
    started.stop()
    sys.stderr.write(started.logs())  # pytest shows it when the test failed
