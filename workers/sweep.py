"""What nobody else cleans up: dead leases, lost messages, candidates, expired images, scratch files."""

import logging
import shutil
import time
from datetime import timedelta
from pathlib import Path

from hscr.errors import NotFound
from hscr.faults import fault_point
from hscr.records import JobKind, JobState
from hscr.store.store import Store
from workers.services import Services

log = logging.getLogger(__name__)


def sweep(services: Services) -> None:
    settings, store = services.settings, services.store
    touched = store.jobs.resend(unclaimed_for=timedelta(seconds=settings.unclaimed_seconds))
    fault_point("sweep.resent")
    _drop_candidate(store)
    expired = store.answers.expire_images()
    if expired:
        fault_point("sweep.expired")
    for digest in expired:
        store.blobs.delete(digest)
    scratch = [folder for folder in _entries(settings.work) if not _running(store, folder.name)]
    scratch += _older(_entries(store.blobs.root / "aside"), settings.keep_temporary_seconds)
    scratch += _older(_unnamed(store), settings.keep_temporary_seconds)
    for entry in scratch:
        _remove(entry)
    if touched or expired or scratch:
        log.info("swept: %d jobs, %d images, %d scratch", len(touched), len(expired), len(scratch))


def _drop_candidate(store: Store) -> None:
    """One that was only proposed, by a release that died too often to clean up, holds a slot everywhere."""
    latest = next(iter(store.releases.history(limit=1)), None)
    if latest is None or latest["action"] != "propose" or latest["body"]["candidate"] is None:
        return
    releases = [
        job.payload.get("version_name")
        for state in (JobState.QUEUED, JobState.RUNNING)
        for job in store.jobs.page(kind=JobKind.RELEASE, state=state)
    ]
    candidate = latest["body"]["candidate"]
    if candidate not in releases:
        store.releases.propose(None, actor="sweep", reason=f"no release of {candidate} goes on")


def _running(store: Store, name: str) -> bool:
    """Whether the attempt that a scratch folder `<job id>.<attempt>` belongs to still runs."""
    job_id, _, attempt = name.partition(".")
    try:
        job = store.jobs.get(job_id)
    except NotFound:
        return False
    return job.state is JobState.RUNNING and str(job.attempt) == attempt


def _unnamed(store: Store) -> list[Path]:
    """Images and adapters that no row names: their writer died before it committed one, or has yet to."""
    present = list(store.blobs.paths())
    named = store.answers.images() | store.releases.digests()
    return [path for path in present if path.name not in named]


def _older(entries: list[Path], seconds: float) -> list[Path]:
    before = time.time() - seconds
    return [entry for entry in entries if entry.stat().st_mtime < before]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _remove(entry: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)
