"""Adapters, their evaluations, the pointer that says which one serves, and who has seen what.

The pointer is one row and its epoch rises with each change. A version may be unloaded when nothing desires it
any more and every live gateway has seen the present epoch with nothing in flight on it.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from hscr.errors import AdapterRefused, Conflict, GateRefused, NotFound, NotLoaded
from hscr.records import (
    AdapterState,
    AdapterVersion,
    Evaluation,
    GateVerdict,
    Pointer,
    PreferenceRecord,
    Replica,
    VersionCounts,
    now,
)
from hscr.store.blobs import Blobs
from hscr.store.database import Database
from hscr.store.keys import claim_idempotency
from hscr.store.sightings import Sightings
from hscr.store.tables import (
    adapter_records,
    adapters,
    canary_counts,
    dependence_scores,
    evaluation_outcomes,
    evaluations,
    gateways,
    pointer,
    pointer_history,
    replicas,
    version_leases,
)
from hscr.store.writers import add_once, put, removing

BASE = "base"


class Releases:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._replicas = Sightings()
        self._gateways = Sightings(trusting=True)

    # -- adapters and evaluations --------------------------------------------------------------------------

    def adapter(self, name: str) -> AdapterVersion:
        with self._database.read() as connection:
            return _adapter(connection, name)

    def adapters(self, *, limit: int | None = 100) -> list[AdapterVersion]:
        """Newest first; with None all of them."""
        query = select(adapters.c.body).order_by(adapters.c.created_at.desc()).limit(limit)
        with self._database.read() as connection:
            return [AdapterVersion.model_validate(body) for body in connection.execute(query).scalars()]

    def drop_unknown(self, digest: str, blobs: Blobs) -> bool:
        """Throw away a stored folder that is no version's; whoever registers one does so before or after."""
        with self._database.write() as connection:
            removing(connection)
            if connection.execute(select(adapters.c.name).where(adapters.c.digest == digest)).first():
                return False
            blobs.delete_folder(digest)
            return True

    def refuse(self, name: str) -> None:
        """Mark a version as unsafe: nothing will load it again."""
        with self._database.write() as connection:
            refused = _adapter(connection, name).but(state=AdapterState.REFUSED)
            values = {"state": AdapterState.REFUSED, "body": refused.model_dump(mode="json")}
            connection.execute(update(adapters).where(adapters.c.name == name).values(**values))

    def trained_on(self, name: str) -> list[str]:
        """Ids of the preference records a version was trained on, also of those deleted since."""
        query = select(adapter_records.c.record).where(adapter_records.c.adapter == name)
        with self._database.read() as connection:
            return list(connection.execute(query.order_by(adapter_records.c.record)).scalars())

    def adapters_trained_on_source(self, source: str) -> list[str]:
        query = select(adapter_records.c.adapter).where(adapter_records.c.source == source).distinct()
        with self._database.read() as connection:
            return sorted(connection.execute(query).scalars())

    def evaluation(self, evaluation_id: str) -> Evaluation:
        query = select(evaluations.c.body).where(evaluations.c.id == evaluation_id)
        with self._database.read() as connection:
            body = connection.execute(query).scalar_one_or_none()
        if body is None:
            raise NotFound(f"No evaluation {evaluation_id}.", remedy="`GET /v1/evaluations` lists them.")
        return Evaluation.model_validate(body)

    def evaluations(self, *, candidate: str | None = None, limit: int = 100) -> list[Evaluation]:
        """Newest first."""
        query = select(evaluations.c.body).order_by(evaluations.c.created_at.desc()).limit(limit)
        if candidate is not None:
            query = query.where(evaluations.c.candidate == candidate)
        with self._database.read() as connection:
            return [Evaluation.model_validate(body) for body in connection.execute(query).scalars()]

    def outcomes(self, evaluation_id: str) -> dict[str, list[dict[str, Any]]]:
        """Every scored answer behind an evaluation, by version name (`base` for none)."""
        query = select(evaluation_outcomes).where(evaluation_outcomes.c.evaluation == evaluation_id)
        with self._database.read() as connection:
            return {row.version: row.body for row in connection.execute(query)}

    def dependence(self, job_id: str) -> dict[str, dict[str, Any]]:
        """What a score job measured: version name (`base` for none) to its body."""
        query = select(dependence_scores).where(dependence_scores.c.job_id == job_id)
        with self._database.read() as connection:
            return {row.version: row.body for row in connection.execute(query)}

    # -- the pointer ---------------------------------------------------------------------------------------

    def pointer(self) -> Pointer:
        with self._database.read() as connection:
            return _pointer(connection)

    def propose(self, version: str | None, *, actor: str, reason: str) -> Pointer:
        """Name the candidate, so that agents load it. Nothing is served differently yet.

        A share of the traffic belongs to its candidate: another one begins without any.
        """
        with self._database.write() as connection:
            if version is not None:
                _servable(connection, version)
            present = _pointer(connection, lock=True)
            share = present.share if version == present.candidate else 0.0
            return _move(connection, "propose", actor, reason, candidate=version, share=share)

    def promote(
        self,
        version: str | None,
        *,
        actor: str,
        reason: str,
        evaluation: str | None = None,
        override: bool = False,
        replicas_seen: timedelta,
    ) -> Pointer:
        """Flip: `version` serves from the next request on, the old one stays loaded as `previous`.

        Raises GateRefused unless `evaluation` passed for this version or `override` names a person's
        decision; Conflict unless every live replica reported the version loaded.
        """
        with self._database.write() as connection:
            return promote_in(
                connection, version, actor=actor, reason=reason, evaluation=evaluation, override=override,
                replicas_seen=replicas_seen,
            )  # fmt: skip

    def rollback(self, *, actor: str, reason: str, idempotency: tuple[str, str] | None = None) -> Pointer:
        """Swap active and previous, both loaded: no replica has to do anything.

        `idempotency` is (key, request digest), scoped to the actor: a repeated request gives the pointer that
        the first one made, and does not go forward again. Raises Conflict, IdempotencyConflict.
        """
        with self._database.write() as connection:
            present = _pointer(connection, lock=True)
            if idempotency is not None:
                known = claim_idempotency(connection, actor, *idempotency, str(present.epoch + 1))
                if known is not None:
                    return _pointer_at(connection, int(known))
            if present.active == present.previous:
                raise Conflict("There is no earlier version to go back to.", remedy="Promote one first.")
            return _move(
                connection, "rollback", actor, reason,
                active=present.previous, previous=present.active, candidate=None, share=0.0,
            )  # fmt: skip

    def end_canary(self, *, actor: str, reason: str, epoch: int | None = None) -> Pointer:
        """All traffic to the active version again; the candidate stays loaded.

        Raises Conflict when no canary runs, or the pointer moved on from `epoch`.
        """
        with self._database.write() as connection:
            present = _pointer(connection, lock=True)
            if not present.share or epoch not in (None, present.epoch):
                raise Conflict("This canary does not run any more.", remedy="Nothing has to be done.")
            return _move(connection, "end-canary", actor, reason, share=0.0)

    def canary_counts(self, epoch: int) -> dict[str, VersionCounts]:
        """By version name (`base` for none), summed over gateways: what came of the canary of this epoch."""
        query = select(canary_counts.c.versions).where(canary_counts.c.epoch == epoch)
        total: dict[str, VersionCounts] = {}
        with self._database.read() as connection:
            for versions in connection.execute(query).scalars():
                for version, body in versions.items():
                    counts = VersionCounts.model_validate(body)
                    total[version] = total.get(version, VersionCounts()) + counts
        return total

    def history(self, *, limit: int = 50) -> list[dict[str, Any]]:
        """Every change of the pointer, newest first: who, why, on which evaluation, overridden or not."""
        query = select(pointer_history).order_by(pointer_history.c.epoch.desc()).limit(limit)
        with self._database.read() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    # -- who has seen what ---------------------------------------------------------------------------------

    def desired(self) -> list[AdapterVersion]:
        """Every version that agents must keep loaded, the most needed first.

        Active, previous, candidate, then what running jobs lease.
        """
        with self._database.read() as connection:
            names = _desired_names(connection)
            known = select(adapters.c.name, adapters.c.body).where(
                adapters.c.name.in_(names), adapters.c.state != AdapterState.REFUSED
            )
            bodies = {row.name: row.body for row in connection.execute(known)}
        return [AdapterVersion.model_validate(bodies[name]) for name in names if name in bodies]

    def lease_version(self, holder: str, version: str, duration: timedelta) -> None:
        """A job's named claim that a version stays loaded; renew by calling again."""
        with self._database.write() as connection:
            _pointer(connection, lock=True)  # `retire` sees the lease, or whoever leases sees what it retired
            put(connection, version_leases, holder=holder, version=version, expires_at=now() + duration)

    def drop_expired_leases(self) -> None:
        """Of attempts that died; they hold nothing any more."""
        with self._database.write() as connection:
            connection.execute(delete(version_leases).where(version_leases.c.expires_at < now()))

    def release_leases(self, holder: str) -> None:
        with self._database.write() as connection:
            connection.execute(delete(version_leases).where(version_leases.c.holder == holder))

    def report_replica(self, replica: Replica) -> None:
        with self._database.write() as connection:
            _write_replica(connection, replica)

    def retire(self, replica_id: str, version: str, *, gateways_seen: timedelta) -> bool:
        """Take a version out of a replica's report, so that the replica may unload it.

        False while anything desires it or a gateway may still send to it, which is over only for one that was
        seen silent for `gateways_seen`: no jump of a clock takes a version from under a request. One
        transaction with the check, so a release sees either a version that stays or a replica that lacks it.
        """
        with self._database.write() as connection:
            epoch = _pointer(connection, lock=True).epoch
            if version in _desired_names(connection):
                return False
            copies = connection.execute(select(gateways)).all()
            alive = self._gateways.alive({copy.id: copy.seen_at for copy in copies}, gateways_seen)
            if not all(_drained(copy, version, epoch) for copy in copies if copy.id in alive):
                return False
            row = select(replicas.c.body).where(replicas.c.id == replica_id)
            for body in connection.execute(row).scalars().all():
                replica = Replica.model_validate(body)
                kept = tuple(name for name in replica.loaded if name != version)
                _write_replica(connection, replica.but(loaded=kept))
            return True

    def remove_replica(self, replica_id: str) -> None:
        with self._database.write() as connection:
            connection.execute(delete(replicas).where(replicas.c.id == replica_id))

    def replicas(self, *, seen_within: timedelta) -> list[Replica]:
        """Replicas whose agent reported lately, by id: as this process saw, if it looks often enough."""
        query = select(replicas.c.id, replicas.c.seen_at, replicas.c.body).order_by(replicas.c.id)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        alive = self._replicas.alive({row.id: row.seen_at for row in rows}, seen_within)
        return [Replica.model_validate(row.body) for row in rows if row.id in alive]

    def report_gateway(
        self,
        gateway_id: str,
        *,
        epoch: int,
        in_flight: dict[str, int],
        canary: dict[str, VersionCounts] | None = None,
    ) -> None:
        """A heartbeat; `canary` is what came of each version's requests in this epoch, if one runs."""
        with self._database.write() as connection:
            put(connection, gateways, id=gateway_id, epoch=epoch, in_flight=in_flight, seen_at=now())
            if canary:
                _write_counts(connection, gateway_id, epoch, canary)

    def remove_gateway(self, gateway_id: str) -> None:
        with self._database.write() as connection:
            connection.execute(delete(gateways).where(gateways.c.id == gateway_id))


def add_adapter(connection: Connection, version: AdapterVersion, records: Iterable[PreferenceRecord]) -> None:
    """Register a trained version in the trainer's transaction; the same bytes again are one version.

    Raises AdapterRefused for a name that does not stand for the version's bytes, Conflict for bytes that are
    a version under another name.
    """
    if not version.well_named:
        raise AdapterRefused(
            f"{version.name!r} is no name of version {version.digest[:12]}.",
            remedy="Name it `<alias>@<first 12 hex digits of its digest>`, the alias in letters and digits.",
        )
    columns = version.model_dump(include={"name", "digest", "state", "job_id", "created_at"})
    if not add_once(connection, adapters, body=version.model_dump(mode="json"), **columns):
        _check_same(connection, version)
        return
    links = [
        {"adapter": version.name, "record": record.id, "study": record.study, "source": record.source}
        for record in records
    ]
    if links:
        connection.execute(insert(adapter_records), links)


def add_evaluation(
    connection: Connection, evaluation: Evaluation, outcomes: dict[str, list[dict[str, Any]]] | None = None
) -> None:
    """Keep an evaluation and the scored answers it rests on, by version name."""
    connection.execute(
        insert(evaluations).values(
            body=evaluation.model_dump(mode="json"),
            **evaluation.model_dump(include={"id", "candidate", "active", "verdict", "job_id", "created_at"}),
        )
    )
    rows = [
        {"evaluation": evaluation.id, "version": version, "body": body}
        for version, body in (outcomes or {}).items()
    ]
    if rows:
        connection.execute(insert(evaluation_outcomes), rows)


def add_dependence(connection: Connection, job_id: str, version: str | None, body: dict[str, Any]) -> None:
    put(connection, dependence_scores, job_id=job_id, version=version or BASE, body=body)


def promote_in(
    connection: Connection,
    version: str | None,
    *,
    actor: str,
    reason: str,
    evaluation: str | None = None,
    override: bool = False,
    replicas_seen: timedelta,
) -> Pointer:
    """`Releases.promote` in the caller's transaction."""
    present = _pointer(connection, lock=True)
    if version == present.active:
        raise Conflict(f"{version or 'The base model'} is already active.")
    if version is not None:
        _servable(connection, version)
        _check_gate(connection, version, evaluation, override=override)
        _check_loaded(connection, version, replicas_seen)
    return _move(
        connection, "promote", actor, reason, evaluation=evaluation, override=override,
        active=version, previous=present.active, candidate=None, share=0.0,
    )  # fmt: skip


def canary_in(
    connection: Connection,
    version: str | None,
    share: float,
    *,
    actor: str,
    reason: str,
    evaluation: str | None = None,
    override: bool = False,
    replicas_seen: timedelta,
) -> Pointer:
    """Send `share` (0 to 1) of the traffic to `version`, in the caller's transaction.

    Raises as `Releases.promote` does: whoever is asked something is asked nothing less than released.
    """
    present = _pointer(connection, lock=True)
    if version is None or version == present.active:
        raise Conflict(f"{version or 'The base model'} cannot be tried beside {present.active or 'itself'}.")
    _servable(connection, version)
    _check_gate(connection, version, evaluation, override=override)
    _check_loaded(connection, version, replicas_seen)
    return _move(
        connection, "canary", actor, reason, evaluation=evaluation, override=override,
        candidate=version, share=share,
    )  # fmt: skip


def _adapter(connection: Connection, name: str) -> AdapterVersion:
    body = connection.execute(select(adapters.c.body).where(adapters.c.name == name)).scalar_one_or_none()
    if body is None:
        raise NotFound(f"No adapter {name}.", remedy="`GET /v1/adapters` lists the versions.")
    return AdapterVersion.model_validate(body)


def _check_same(connection: Connection, version: AdapterVersion) -> None:
    query = select(adapters.c.name).where(adapters.c.digest == version.digest)
    name = connection.execute(query).scalar_one()
    if name != version.name:
        raise Conflict(f"The bytes of {version.name} are {name} already.", remedy=f"Use {name}.")


def _servable(connection: Connection, name: str) -> None:
    if _adapter(connection, name).state is AdapterState.REFUSED:
        raise Conflict(f"{name} was refused as unsafe to load.", remedy="Train again; see its job's error.")


def _check_gate(connection: Connection, version: str, evaluation: str | None, *, override: bool) -> None:
    if override:
        return
    query = select(evaluations.c.verdict).where(evaluations.c.candidate == version)
    query = query.where(evaluations.c.id == evaluation) if evaluation else query
    verdict = connection.execute(
        query.order_by(evaluations.c.created_at.desc()).limit(1)
    ).scalar_one_or_none()
    if verdict != GateVerdict.PASS:
        raise GateRefused(
            f"{version} has no passed evaluation (latest verdict: {verdict or 'none'}).",
            remedy="Evaluate it, or promote with `override` and a reason; your key goes on record.",
        )


def _check_loaded(connection: Connection, version: str, seen_within: timedelta) -> None:
    """Raises NotLoaded."""
    live = _replicas(connection, seen_within)
    missing = [replica.id for replica in live if version not in replica.loaded]
    if missing or not live:
        raise NotLoaded(
            f"{version} is not loaded on {', '.join(missing) or 'any replica: none is live'}.",
            remedy="Wait for the agents, or read the replica's problem in `hscr status`.",
        )


def _desired_names(connection: Connection) -> list[str]:
    """Without repetition, the most needed first."""
    present = _pointer(connection)
    query = select(version_leases.c.version).where(version_leases.c.expires_at > now())
    leased = connection.execute(query.order_by(version_leases.c.version)).scalars()
    wanted = (present.active, present.previous, present.candidate, *leased)
    return list(dict.fromkeys(name for name in wanted if name))


def _drained(copy: Row[Any], version: str, epoch: int) -> bool:
    """Whether a gateway has seen the epoch and has nothing in flight on the version."""
    return bool(copy.epoch >= epoch and copy.in_flight.get(version, 0) == 0)


def _write_replica(connection: Connection, replica: Replica) -> None:
    body = replica.model_dump(mode="json")
    put(connection, replicas, id=replica.id, seen_at=replica.seen_at, body=body)


def _write_counts(connection: Connection, gateway: str, epoch: int, counts: dict[str, VersionCounts]) -> None:
    versions = {version: each.model_dump(mode="json") for version, each in counts.items()}
    put(connection, canary_counts, epoch=epoch, gateway=gateway, versions=versions)


def _replicas(connection: Connection, seen_within: timedelta) -> list[Replica]:
    lately = replicas.c.seen_at.between(now() - seen_within, now() + seen_within)
    query = select(replicas.c.body).where(lately).order_by(replicas.c.id)
    return [Replica.model_validate(body) for body in connection.execute(query).scalars()]


def _pointer(connection: Connection, *, lock: bool = False) -> Pointer:
    query = select(pointer).where(pointer.c.id == 1)
    row = connection.execute(query.with_for_update() if lock else query).mappings().one()
    return Pointer.model_validate({name: value for name, value in row.items() if name != "id"})


def _pointer_at(connection: Connection, epoch: int) -> Pointer:
    query = select(pointer_history.c.body).where(pointer_history.c.epoch == epoch)
    return Pointer.model_validate(connection.execute(query).scalar_one())


def _move(
    connection: Connection,
    action: str,
    actor: str,
    reason: str,
    *,
    evaluation: str | None = None,
    override: bool = False,
    **changes: Any,
) -> Pointer:
    query = update(pointer).where(pointer.c.id == 1).values(epoch=pointer.c.epoch + 1, **changes)
    connection.execute(query)
    moved = _pointer(connection)
    values = {
        "action": action,
        "actor": actor,
        "reason": reason,
        "evaluation": evaluation,
        "override": override,
    }
    connection.execute(
        insert(pointer_history).values(epoch=moved.epoch, created_at=now(), body=moved.model_dump(), **values)
    )
    return moved
