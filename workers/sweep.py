"""What nobody else cleans up: dead leases, lost messages, candidates, expired images, scratch files."""

import logging
from collections import Counter
from datetime import timedelta
from pathlib import Path

from celery import Celery

from hscr.errors import NotFound
from hscr.faults import fault_point
from hscr.records import JobKind, JobState
from hscr.store.blobs import remove
from hscr.store.check import check, keep_findings, repair
from hscr.store.store import Store
from workers.broker import held
from workers.checkpoints import drop_ended, drop_handed_over
from workers.contract import QUEUE_OF
from workers.copies import drop_left_aside
from workers.services import Services

log = logging.getLogger(__name__)


def sweep(services: Services, app: Celery) -> None:
    settings, store = services.settings, services.store
    drop_ended(store)
    # First, because on a full disk nothing else can be done.
    left = drop_left_aside(store.blobs, older_than=settings.keep_temporary)
    scratch = [folder for folder in _entries(settings.work) if not _running(store, folder.name)]
    for entry in scratch:
        remove(entry)
    touched = store.jobs.resend(
        unclaimed_for=timedelta(seconds=settings.unclaimed_seconds),
        silent_for=settings.lease,
        kinds=_missed(store, app),
    )
    fault_point("sweep.resent")
    store.releases.drop_expired_leases()
    _drop_candidate(store)
    expired = store.answers.expire_images()
    if expired:
        fault_point("sweep.expired")
    expired = store.images.drop_unheld(expired)
    if touched or expired or scratch or left:
        log.info(
            "swept: %d jobs, %d images, %d scratch", len(touched), len(expired), len(scratch) + len(left)
        )


def check_store(services: Services) -> None:
    """Once in a while: throw away files that no row names, and tell of rows whose files are gone.

    What asks an object store for a list is here: a sweep is too frequent, and must not need one.
    """
    findings = check(services.store, older_than=services.settings.keep_temporary)
    repair(services.store, findings)
    keep_findings(services.store, findings)
    drop_handed_over(services.store)
    thrown = len(findings.unheld_images) + len(findings.unknown_folders)
    if thrown:
        log.info("store check: %d files that no row names were thrown away", thrown)
    if findings.lost:
        lost = ", ".join((*findings.lost_images, *findings.lost_adapters))
        log.error("store check: rows whose files are gone; restore them from a backup: %s", lost)


def _missed(store: Store, app: Celery) -> list[JobKind]:
    """Kinds with more jobs waiting than their queue holds messages.

    A long queue forgets nothing by being long: whoever sent its messages again would only make it longer.
    """
    before = store.jobs.sent()
    messages = {queue: held(app, queue) for queue in {QUEUE_OF[kind] for kind in before}}
    waiting: Counter[str] = Counter()
    for kind, number in (before & store.jobs.sent()).items():  # what came or began meanwhile is not missed
        waiting[QUEUE_OF[kind]] += number
    return [kind for kind in JobKind if waiting[QUEUE_OF[kind]] > messages.get(QUEUE_OF[kind], 0)]


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


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
