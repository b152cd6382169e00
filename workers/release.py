"""The release job: every replica loads the version first, then one row changes."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from hscr.errors import DatabaseUnavailable, HscrError, LeaseLost, NotLoaded
from hscr.faults import fault_point
from hscr.records import Pointer
from hscr.store.releases import Releases, canary_in, promote_in
from workers.contract import ReleasePayload
from workers.leases import Done, Lease
from workers.rollout import await_loaded
from workers.services import Services

log = logging.getLogger(__name__)


def release(services: Services, lease: Lease) -> Done:
    """Propose, wait for the replicas, promote. A failure leaves what is served as it was."""
    payload = lease.payload(ReleasePayload)
    present = services.store.releases.pointer()
    if _moved(present, payload):
        return Done({"already_active": True, **_told(present)})
    with _candidate(services.store.releases, payload):
        lease.hold(payload.version_name)  # also while another release names another candidate
        moved = _promoted(services, lease, payload)
        fault_point("release.flipped")
    return Done({"already_active": False, **_told(moved)})


def _promoted(services: Services, lease: Lease, payload: ReleasePayload) -> Pointer:
    """A replica that is silent at the flip, as after a database stood still, is waited for again."""
    until = time.monotonic() + services.settings.rollout_seconds
    while True:
        if payload.version_name is not None:
            await_loaded(services, lease, payload.version_name)
            log.info("%s is loaded on every live replica", payload.version_name)
        fault_point("release.loaded")
        try:
            return _promote(services, lease, payload)
        except NotLoaded:
            if time.monotonic() > until:
                raise


def _moved(present: Pointer, payload: ReleasePayload) -> bool:
    """Whether the pointer is there: an earlier attempt may have died between its move and the job's end."""
    if payload.share is None:
        return present.active == payload.version_name
    return (present.candidate, present.share) == (payload.version_name, payload.share)


@contextmanager
def _candidate(releases: Releases, payload: ReleasePayload) -> Iterator[None]:
    """Have the agents load the version; if the release fails, they need not keep it."""
    version, actor = payload.version_name, payload.actor
    if version is not None:
        releases.propose(version, actor=actor, reason=payload.reason)
        fault_point("release.proposed")
    try:
        yield
    except (LeaseLost, DatabaseUnavailable):
        raise
    except HscrError:
        if version is not None and releases.pointer().candidate == version:
            releases.propose(None, actor=actor, reason=f"the release of {version} failed")
        raise


def _promote(services: Services, lease: Lease, payload: ReleasePayload) -> Pointer:
    move: Callable[..., Pointer] = (
        promote_in if payload.share is None else partial(canary_in, share=payload.share)
    )
    # One transaction with the job's lease, so that a worker thought dead cannot flip the pointer.
    with lease.fenced() as connection:
        moved = move(
            connection,
            payload.version_name,
            actor=payload.actor,
            reason=payload.reason,
            evaluation=payload.evaluation_id,
            override=payload.override,
            replicas_seen=services.settings.replicas_seen,
        )
        fault_point("release.flip")
    return moved


def _told(pointer: Pointer) -> dict[str, Any]:
    return {"active": pointer.active, "previous": pointer.previous, "epoch": pointer.epoch}
