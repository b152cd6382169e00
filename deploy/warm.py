"""Inside a build, `python warm.py`: bytecode of what the processes import, and of nothing else.

A read-only container could add none and would compile everything at each start. Imports that this misses cost
a moment at each start, and nothing else.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

from finish import set_times

MODULES = """
    service.__main__ service.app workers.app workers.agent workers.outbox workers.evaluate workers.release
    hscr.cli hscr.client hscr.doctor hscr.healthcheck hscr.store.store hscr.store.bucket_blobs
    alembic.command sqlalchemy.dialects.postgresql.psycopg sqlalchemy.dialects.sqlite celery.bin.celery
    celery.bin.worker celery.apps.worker celery.apps.beat celery.concurrency.thread kombu.transport.redis
    uvicorn.loops.uvloop uvicorn.protocols.http.httptools_impl uvicorn.lifespan.on
"""
WITH_TORCH = "workers.gpu_child workers.gpu_work service.embedded.__main__ hscr.learn.trainer"


def main() -> None:
    roots = [Path(name) for name in sys.argv[1:]]
    for root in roots:  # bytecode names the time of its source
        set_times(root)
    torch = importlib.util.find_spec("torch") is not None
    for module in (MODULES + WITH_TORCH * torch).split():
        importlib.import_module(module)
    if torch:
        vlm = importlib.import_module("hscr.models.vlm")
        vlm.VLM.load(Path(os.environ["MODEL"]))
    for root in roots:
        set_times(root)


if __name__ == "__main__":
    main()
