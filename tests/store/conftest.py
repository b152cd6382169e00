"""Every test of the store runs on both databases."""

from pathlib import Path

import pytest

from hscr.store.database import Database
from hscr.store.settings import StoreSettings
from tests.postgres_server import PostgresServer


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> StoreSettings:
    """A home of its own with a migrated database."""
    home = tmp_path / "home"
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return StoreSettings(home=home, database_url=server.migrated())
    settings = StoreSettings(home=home, database_url=None)
    database = Database(settings.database)
    database.upgrade()
    database.close()
    return settings
