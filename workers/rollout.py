"""Waiting until every live replica serves a version."""

import time

from hscr.errors import AdapterRefused, EngineUnavailable
from hscr.records import AdapterState, Replica
from workers.leases import Lease
from workers.services import Services

_POLL_SECONDS = 0.2


def await_loaded(services: Services, lease: Lease, *versions: str) -> list[Replica]:
    """The live replicas, once all of them report every version loaded and probed.

    Raises EngineUnavailable that names the replica and its problem when the time is over, AdapterRefused when
    an agent found the version unfit, and whatever ends the attempt.
    """
    until = time.monotonic() + services.settings.rollout_seconds
    while True:
        lease.check()
        live = services.store.releases.replicas(seen_within=services.settings.replicas_seen)
        missing = [(replica, name) for replica in live for name in versions if name not in replica.loaded]
        if live and not missing:
            return live
        for name in versions:
            _refuse_unfit(services, name, live)
        if time.monotonic() > until:
            raise _late(live, missing)
        lease.wait(_POLL_SECONDS)


def _refuse_unfit(services: Services, name: str, live: list[Replica]) -> None:
    """The refusal comes a moment before its reason, which is worth waiting for."""
    told = [f"{replica.id}: {replica.problem}" for replica in live if name in (replica.problem or "")]
    if told and services.store.releases.adapter(name).state is AdapterState.REFUSED:
        raise AdapterRefused(f"{name} was refused by {'; '.join(told)}", remedy="Train a new version.")


def _late(live: list[Replica], missing: list[tuple[Replica, str]]) -> EngineUnavailable:
    if not live:
        return EngineUnavailable(
            "No replica is live.", remedy="Start an engine with its agent; `hscr status` shows them."
        )
    told = "; ".join(
        f"{replica.id} has not loaded {name} ({replica.problem or 'no problem reported'})"
        for replica, name in missing
    )
    return EngineUnavailable(
        f"Not every replica is ready in time: {told}.", remedy="Solve the replica's problem and try again."
    )
