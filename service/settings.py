"""How one copy of the gateway is configured: the environment, prefix `HSCR_`."""

import os
import secrets
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

from pydantic import Field, SecretStr

from hscr.imaging.guard import Limits
from hscr.store.settings import StoreSettings


class GatewaySettings(StoreSettings):
    """Times are in seconds unless the name says otherwise."""

    host: str = Field(default="127.0.0.1", description="address to bind; keys are required off loopback")
    port: int = Field(default=8080, ge=0, le=65535)

    max_body_bytes: int = Field(default=64_000_000, ge=1, description="of one request, as sent")
    max_image_pixels: int = Field(default=40_000_000, ge=1, le=89_000_000, description="width x height")
    max_question: int = Field(default=2000, ge=1, description="characters of one text")
    max_messages: int = Field(default=16, ge=1, description="messages of one chat request")
    max_rows: int = Field(default=2000, ge=1, description="uploaded rows of one preference job")
    max_in_flight: int = Field(default=64, ge=1, description="questions admitted at once; more get 429")
    max_outstanding_per_replica: int = Field(
        default=32,
        ge=1,
        description="of this copy at one engine; when all are full, 429 instead of a longer queue there",
    )

    store_threads: int = Field(default=8, ge=1, le=12, description="database calls at once; the pool has 15")
    image_threads: int = Field(default=2, ge=1, description="images decoded at once")

    request_deadline: float = Field(default=120.0, gt=0, description="of one answer, waiting included")
    engine_connect_timeout: float = Field(
        default=5.0,
        gt=0,
        description="for a connection to an engine, and for its host to confirm what was sent",
    )
    engine_silence: float = Field(default=60.0, gt=0, description="longest pause between two engine reads")
    client_silence: float = Field(
        default=30.0, gt=0, description="a client that takes nothing this long loses its stream"
    )
    circuit_failures: int = Field(default=3, ge=1, description="in a row open a replica's circuit")
    circuit_pause: float = Field(default=1.0, gt=0, description="before the first try of an open circuit")
    circuit_longest_pause: float = Field(default=30.0, gt=0, description="the pause doubles up to this")
    pointer_poll: float = Field(default=0.25, gt=0, description="between two looks at the pointer")
    pointer_stale: float = Field(default=3.0, gt=0, description="without a refresh this long, admit nothing")
    replicas_seen: float = Field(default=10.0, gt=0, description="a replica silent this long is gone")
    replicas_silent: float = Field(
        default=2.0, gt=0, description="a replica silent this long is asked only when no other is left"
    )
    event_poll: float = Field(default=0.25, gt=0, description="how often a job's event stream looks for more")
    drain_notice: float = Field(
        default=0.0,
        ge=0,
        description="from SIGTERM, when /readyz begins to fail, until connections are refused",
    )
    drain_grace: int = Field(default=30, ge=1, description="for requests in flight, from then on")

    image_ttl_hours: float = Field(default=24.0, gt=0, description="of images nobody consented to train on")
    study_secret: SecretStr | None = Field(
        default=None, description="keys the hash of DICOM study UIDs; a file in HOME holds one when absent"
    )
    caption_prompt: str = Field(
        default="Describe this image.", description="what a caption without a prompt of its own is asked by"
    )
    suites: tuple[str, ...] = Field(default=("phantom",), description="evaluation suites a request may name")
    auto_promote: bool = Field(default=False, description="whether a request may ask for promotion on pass")
    log_level: str = Field(
        default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="the least that is logged"
    )

    @property
    def loopback(self) -> bool:
        """Whether nobody but this machine can connect."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def limits(self) -> Limits:
        return Limits(bytes=self.max_body_bytes, pixels=self.max_image_pixels)

    @property
    def image_ttl(self) -> timedelta:
        return timedelta(hours=self.image_ttl_hours)

    def study_key(self) -> bytes:
        """The secret for study hashes, made once per installation and shared by all its copies."""
        if self.study_secret is not None:
            return self.study_secret.get_secret_value().encode()
        return _kept_secret(self.home / "study.secret")


def _kept_secret(path: Path) -> bytes:
    """Read the secret, or be the one copy that makes it: a link appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        try:
            path.hardlink_to(aside)
        except FileExistsError:
            pass  # another copy was first: its secret counts
        finally:
            aside.unlink()
    return path.read_bytes()
