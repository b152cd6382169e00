"""Real queues, real worker processes, short leases."""

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from hscr.store.store import Store
from tests.redis_server import RedisServer, free_port
from tests.tiny_llava import build
from tests.workers.engines import Engine, probe
from tests.workers.harness import FAST, Processes, make_adapter, migrated
from workers.settings import EMBEDDED_MODEL, WorkerSettings

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


@pytest.fixture(scope="module")
def running() -> Iterator[Engine]:
    """The embedded model: what a random one says cannot be read back into the same tokens."""
    engine = Engine(EMBEDDED_MODEL, free_port())
    engine.start()
    yield engine
    engine.kill()


@pytest.fixture
def engine(running: Engine) -> Engine:
    """With no adapter in it."""
    for name in running.adapters():
        running.unload(name)
    return running


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of the embedded model, each of which answers differently, and not as the base."""
    where = tmp_path_factory.mktemp("adapters")
    return [make_adapter(EMBEDDED_MODEL, where / str(seed), seed=seed, scale=0.07) for seed in (1, 2, 3)]


@pytest.fixture(scope="session")
def probes(folders: list[Path]) -> list[dict[str, Any]]:
    return [probe(EMBEDDED_MODEL, folder) for folder in folders]
