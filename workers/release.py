"""The release job: every replica loads the version first, then one row changes."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from hscr.errors import DatabaseUnavailable, HscrError, LeaseLost
from hscr.records import Pointer
from hscr.store.releases import Releases, canary_in, promote_in
from workers.contract import ReleasePayload
from workers.leases import Done, Lease
from workers.rollout import await_loaded
from workers.services import Services

log = logging.getLogger(__name__)


def release(services: Services, lease: Lease) -> Done:
    """Propose, wait for the replicas, promote. A failure leaves what is served as it was."""
    payload = ReleasePayload.model_validate(lease.job.payload)
    present = services.store.releases.pointer()
    if present.active == payload.version_name:
        return Done({"already_active": True, **_told(present)})
    with _candidate(services.store.releases, payload):
        if payload.version_name is not None:
            lease.hold(payload.version_name)  # also while another release names another candidate
            await_loaded(services, lease, payload.version_name)
            log.info("%s is loaded on every live replica", payload.version_name)
        moved = _promote(services, lease, payload)
    return Done({"already_active": False, **_told(moved)})


@contextmanager
def _candidate(releases: Releases, payload: ReleasePayload) -> Iterator[None]:
    """Have the agents load the version; if the release fails, they need not keep it."""
    version, actor = payload.version_name, payload.actor
    if version is not None:
        releases.propose(version, actor=actor, reason=payload.reason)
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
        return move(
            connection,
            payload.version_name,
            actor=payload.actor,
            reason=payload.reason,
            evaluation=payload.evaluation_id,
            override=payload.override,
            replicas_seen=services.settings.replicas_seen,
        )


def _told(pointer: Pointer) -> dict[str, Any]:
    return {"active": pointer.active, "previous": pointer.previous, "epoch": pointer.epoch}
