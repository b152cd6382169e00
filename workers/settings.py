"""What workers, relay, beat and agent read from the environment, prefix `HSCR_`."""

from datetime import timedelta
from pathlib import Path

from pydantic import Field

from hscr.store.settings import StoreSettings

EMBEDDED_MODEL = Path(__file__).parent.parent / "hscr" / "models" / "phantom" / "weights"


class WorkerSettings(StoreSettings):
    model_path: Path = Field(default=EMBEDDED_MODEL, description="folder of the base model")
    device: str = Field(default="cpu", description="torch device of the GPU child", examples=["cuda:0"])
    dtype: str = Field(default="float32", description="of the base weights in the GPU child")
    torch_threads: int = Field(default=1, ge=1, description="CPU threads of the GPU child")

    lease_seconds: float = Field(default=30, gt=0, description="a worker silent for longer has lost its job")
    heartbeat_seconds: float = Field(default=2, gt=0, description="between two looks at the job's row")
    job_timeout_seconds: float = Field(default=6 * 3600, gt=0, description="the longest run of one attempt")
    child_idle_seconds: float = Field(default=300, gt=0, description="then the GPU's memory is given back")
    child_grace_seconds: float = Field(default=3, gt=0, description="to stop when asked, before SIGTERM")
    child_silence_seconds: float = Field(
        default=900, gt=0, description="a GPU child that shows no progress for longer is stuck and killed"
    )
    checkpoint_every: int = Field(default=50, ge=0, description="steps of a fine-tune; 0 keeps none")
    checkpoint_grace_seconds: float = Field(
        default=6, gt=0, description="for a fine-tune's step and checkpoint when its worker must go"
    )
    stop_grace_seconds: float = Field(
        default=25, gt=0, description="from SIGTERM to a worker's forced end; more than checkpoint_grace"
    )
    write_every: int = Field(default=16, ge=1, description="generated records per transaction")

    one_job_seconds: float | None = Field(
        default=None, gt=0, description="a worker ends after its first job, or when none came for so long"
    )
    health_file: Path | None = Field(
        default=None, description="touched while worker, relay, agent or beat gets on; for `hscr.healthcheck`"
    )

    relay_seconds: float = Field(default=0.2, gt=0, description="between two looks at the outbox")
    sweep_seconds: float = Field(default=5, gt=0, description="between two looks for what was left behind")
    check_store_seconds: float = Field(
        default=3600, gt=0, description="between two comparisons of files and rows"
    )
    unclaimed_seconds: float = Field(default=60, gt=0, description="then a message its queue misses is lost")
    keep_temporary_seconds: float = Field(default=24 * 3600, gt=0, description="age of a forgotten upload")

    replica_seen_seconds: float = Field(default=10, gt=0, description="a replica silent for longer is gone")
    gateway_seen_seconds: float = Field(default=10, gt=0, description="a gateway silent for longer is gone")
    rollout_seconds: float = Field(default=120, gt=0, description="for all replicas to load a version")

    canary_seconds: float = Field(default=2, gt=0, description="between two looks at a running canary")
    canary_min_requests: int = Field(default=50, ge=1, description="of each version before it is judged")
    canary_error_margin: float = Field(
        default=0.02, ge=0, le=1, description="how much higher the candidate's error rate may be"
    )
    canary_latency_ratio: float = Field(
        default=1.5, ge=1, description="how much longer the candidate's mean time to first text may be"
    )

    consider_seconds: float = Field(default=60, gt=0, description="between two looks for new records")
    finetune_threshold: int = Field(default=200, ge=1, description="new consented sources that start a loop")
    finetune_min_interval_seconds: float = Field(
        default=24 * 3600, ge=0, description="between two loops that start by themselves"
    )
    finetune_from_hour: int = Field(default=0, ge=0, le=23, description="UTC; may lie after the end: a night")
    finetune_until_hour: int = Field(default=24, ge=1, le=24, description="UTC, exclusive")
    auto_promote: bool = Field(default=False, description="release what passed its gate without a person")

    @property
    def lease(self) -> timedelta:
        return timedelta(seconds=self.lease_seconds)

    @property
    def keep_temporary(self) -> timedelta:
        return timedelta(seconds=self.keep_temporary_seconds)

    @property
    def replicas_seen(self) -> timedelta:
        return timedelta(seconds=self.replica_seen_seconds)

    def show_life(self) -> None:
        """Touch the health file, if one is named."""
        if self.health_file is not None:
            self.health_file.touch()

    @property
    def work(self) -> Path:
        """Scratch folders, one per attempt of a job; swept when their attempt is over."""
        return self.home / "work"
