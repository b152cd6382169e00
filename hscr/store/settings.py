"""Where the rows, the bytes and the queue are: the same for every process."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class StoreSettings(BaseSettings):
    """Read from the environment, prefix `HSCR_`."""

    model_config = SettingsConfigDict(env_prefix="HSCR_", extra="ignore")

    home: Path = Field(default=Path(".hscr"), description="state of a one-machine installation")
    database_url: str | None = Field(
        default=None, description="postgresql://... or sqlite:///...; `HOME/hscr.db` (SQLite) when absent"
    )
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", description="Celery's broker")

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'hscr.db'}"

    @property
    def blobs(self) -> Path:
        return self.home / "blobs"
