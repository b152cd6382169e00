"""Where the rows, the bytes and the queue are: the same for every process."""

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


def _secrets() -> Path | None:
    """Containers find their secrets here, a file for each; elsewhere there is no such folder."""
    folder = Path(os.environ.get("HSCR_SECRETS_DIR", "/run/secrets"))
    return folder if folder.is_dir() else None


class StoreSettings(BaseSettings):
    """Read from the environment, prefix `HSCR_`, or else from files of these names in `HSCR_SECRETS_DIR`.

    So a password need not be in the environment: /run/secrets/hscr_database_url holds the URL.
    """

    model_config = SettingsConfigDict(env_prefix="HSCR_", extra="ignore", secrets_dir=_secrets())

    home: Path = Field(default=Path(".hscr"), description="state of a one-machine installation")
    database_url: str | None = Field(
        default=None, description="postgresql://... or sqlite:///...; `HOME/hscr.db` (SQLite) when absent"
    )
    min_free_bytes: int = Field(
        default=100_000_000,
        ge=0,
        description="with less left on the store's disk nothing new is begun, so that what runs can end",
    )
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", description="Celery's broker")

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'hscr.db'}"

    @property
    def blobs(self) -> Path:
        return self.home / "blobs"
