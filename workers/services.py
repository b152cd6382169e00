"""What the body of every task is given."""

from dataclasses import dataclass

from hscr.store.store import Store
from workers.gpu import Gpu
from workers.settings import WorkerSettings


@dataclass(frozen=True)
class Services:
    settings: WorkerSettings
    store: Store
    gpu: Gpu
