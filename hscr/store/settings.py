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

    model_config = SettingsConfigDict(
        env_prefix="HSCR_", env_ignore_empty=True, extra="ignore", secrets_dir=_secrets()
    )

    home: Path = Field(default=Path(".hscr"), description="state of a one-machine installation")
    database_url: str | None = Field(
        default=None, description="postgresql://... or sqlite:///...; `HOME/hscr.db` (SQLite) when absent"
    )
    blobs_url: str | None = Field(
        default=None, description="s3://BUCKET[/PREFIX] for images and adapters; `HOME/blobs` when absent"
    )
    s3_endpoint: str | None = Field(
        default=None,
        description="of an S3-compatible store other than AWS's",
        examples=["https://minio:9000"],
    )
    s3_region: str | None = Field(default=None, description="of the bucket", examples=["eu-central-1"])
    s3_access_key_id: str | None = Field(
        default=None, description="who asks; without one AWS's own ways are tried: variables, pod or node"
    )
    s3_secret_access_key: str | None = Field(default=None, description="belongs to the access key")
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
