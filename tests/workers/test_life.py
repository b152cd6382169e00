"""Processes that serve no port show that they live, by a file each."""

from pathlib import Path

from tests.waiting import wait_until
from tests.workers.harness import Processes


def test_relay_worker_and_beat_touch_their_files_again_and_again(
    processes: Processes, tmp_path: Path
) -> None:
    files = {name: tmp_path / name for name in ("relay", "worker", "beat")}
    sign = {name: {"HSCR_HEALTH_FILE": str(file)} for name, file in files.items()}
    processes.start("workers.outbox", **sign["relay"])
    processes.worker("control", **sign["worker"])
    processes.start("celery", "-A", "workers.app", "beat", **sign["beat"])
    for _ in range(2):
        for name, file in files.items():
            wait_until(file.exists, seconds=60, what=f"a sign of life of the {name}")
            file.unlink()
