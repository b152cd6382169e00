"""Files of one attempt."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workers.leases import Lease
from workers.services import Services


@contextmanager
def scratch(services: Services, lease: Lease) -> Iterator[Path]:
    """A folder of this attempt; what a killed one leaves is swept."""
    folder = services.settings.work.absolute() / f"{lease.job.id}.{lease.job.attempt}"
    folder.mkdir(parents=True, mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
