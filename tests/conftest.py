"""Fixtures that more than one part of the suite needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hscr.store.database import Database
from hscr.store.settings import StoreSettings
from hscr.store.store import Store


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
