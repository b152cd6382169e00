"""The way back by itself: a candidate that does worse than the active version loses its share of traffic."""

import logging

from hscr.errors import Conflict
from hscr.faults import fault_point
from hscr.records import Pointer, VersionCounts
from hscr.store.releases import BASE
from workers.services import Services
from workers.settings import WorkerSettings

log = logging.getLogger(__name__)

ACTOR = "canary"


def watch_canary(services: Services) -> Pointer | None:
    """End a canary that is worse beyond its margins, on record with the numbers; the new pointer, if so."""
    releases = services.store.releases
    present = releases.pointer()
    if not present.share or present.candidate is None:
        return None
    fault_point("canary.watched")
    counts = releases.canary_counts(present.epoch)
    candidate = counts.get(present.candidate, VersionCounts())
    reason = worse(candidate, counts.get(present.active or BASE, VersionCounts()), services.settings)
    if reason is None:
        return None
    try:
        moved = releases.end_canary(actor=ACTOR, reason=reason, epoch=present.epoch)
    except Conflict:  # somebody moved the pointer since: these numbers are of a canary that is over
        return None
    log.warning("the canary of %s is over: %s", present.candidate, reason)
    return moved


def worse(candidate: VersionCounts, active: VersionCounts, settings: WorkerSettings) -> str | None:
    """In which way the candidate is worse, in numbers; None while it is not, or with too few requests."""
    if min(candidate.requests, active.requests) < settings.canary_min_requests:
        return None
    of = f"of {candidate.requests} requests; active: "
    if candidate.error_rate > active.error_rate + settings.canary_error_margin:
        return f"errors {candidate.error_rate:.1%} {of}{active.error_rate:.1%} of {active.requests}"
    if active.texts and candidate.mean_seconds > settings.canary_latency_ratio * active.mean_seconds:
        told = f"{active.mean_seconds:.3f} s of {active.requests}"
        return f"mean time to first text {candidate.mean_seconds:.3f} s {of}{told}"
    return None
