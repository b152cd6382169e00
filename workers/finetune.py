"""The finetune job: a LoRA adapter from the base model and all live consented records."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from hscr.errors import Conflict
from hscr.faults import fault_point
from hscr.records import AdapterVersion, JobKind, PreferenceRecord
from hscr.store.preferences import all_live
from hscr.store.releases import add_adapter
from hscr.store.store import Store
from workers.adapter_check import check_adapter
from workers.checkpoints import Kept
from workers.contract import FinetunePayload, ScorePayload
from workers.gpu import Event
from workers.leases import AttemptOver, Done, Lease
from workers.scratch import scratch
from workers.services import Services

MIN_RECORDS = 8
_ALL = 1_000_000


def finetune(services: Services, lease: Lease) -> Done:
    """Train, check, store, register; then have it scored, if the payload says so.

    Training goes on from the checkpoint of an earlier attempt if there is one that can be used.
    """
    payload = lease.payload(FinetunePayload)
    kept = Kept.take_over(services.store, lease)
    records = _records(services.store, payload, kept, lease)
    if len(records) < MIN_RECORDS:
        raise Conflict(
            f"{len(records)} live consented records of method {payload.method} are too few to train on.",
            remedy=f"Collect at least {MIN_RECORDS} and run a generate job for them first.",
        )
    with scratch(services, lease) as folder:
        result = _train(services, lease, payload, records, kept=kept, folder=folder)
        fault_point("finetune.trained")
        check_adapter(folder / "adapter", services.settings.model_path)
        lease.check()
        digest = services.store.blobs.put_folder(folder / "adapter")
        fault_point("finetune.published")
    version = _version(lease, payload, records, digest, result)

    def write(connection: Connection) -> None:
        if not all_live(connection, records):
            raise AttemptOver("a study that it was trained on was deleted meanwhile")
        if not services.store.blobs.holds_folder(digest):
            raise AttemptOver("the adapter's files went before it was registered")
        add_adapter(connection, version, records)

    return Done(
        {
            "adapter": version.name,
            "records": len(records),
            "metrics": version.metrics,
            "warnings": result["warnings"],
        },
        _then(lease, payload, version),
        write,
    )


def _records(store: Store, payload: FinetunePayload, kept: Kept, lease: Lease) -> Sequence[PreferenceRecord]:
    """Those that an earlier attempt trained on, if all of them are still live; else the newest live ones."""
    begun = kept.records()
    if begun is not None:
        live = {record.id: record for record in store.preferences.live(method=payload.method, limit=_ALL)}
        if live.keys() >= set(begun):
            return [live[record_id] for record_id in begun]
        kept.forget()
        lease.tell("A record was deleted since training began: it starts anew, without its checkpoint.")
    records = store.preferences.live(method=payload.method, limit=payload.config.max_records)
    kept.begin([record.id for record in records])
    return records


def _train(
    services: Services,
    lease: Lease,
    payload: FinetunePayload,
    records: Sequence[PreferenceRecord],
    *,
    kept: Kept,
    folder: Path,
) -> dict[str, Any]:
    listed = folder / "records.jsonl"
    listed.write_text("".join(record.model_dump_json() + "\n" for record in records))

    resumed: dict[str, int] = {}

    def on_event(event: Event) -> None:
        if event["event"] == "resumed":
            resumed["resumed_at"] = event["step"]
            lease.tell(f"Resumed at step {event['step']}.")
        elif event["event"] == "refused":
            lease.tell(f"Training starts anew: {event['reason']}")
        elif event["event"] == "unshared":
            lease.tell(f"A checkpoint stayed on this machine: {event['reason']}")
        else:
            lease.report(event["done"], event["total"], "steps", loss=event["metrics"].get("loss"), **resumed)

    return services.gpu.run(
        "finetune",
        {
            "records": str(listed),
            "out": str(folder / "adapter"),
            "config": payload.config.resolved(),
            "kept": str(kept.folder),
            "every": services.settings.checkpoint_every,
        },
        on_event=on_event,
        check=lease.check,
    )


def _version(
    lease: Lease,
    payload: FinetunePayload,
    records: Sequence[PreferenceRecord],
    digest: str,
    result: dict[str, Any],
) -> AdapterVersion:
    alias = "sft" if payload.config.objective == "sft" else payload.method
    ids = "\n".join(sorted(record.id for record in records))
    return AdapterVersion(
        name=f"{alias}@{digest[:12]}",
        digest=digest,
        base_digest=result["base_digest"],
        job_id=lease.job.id,
        config=payload.config.resolved(),
        records=len(records),
        records_digest=hashlib.sha256(ids.encode()).hexdigest(),
        metrics=result["metrics"],
        probe=result["probe"],
    )


def _then(lease: Lease, payload: FinetunePayload, version: AdapterVersion) -> tuple[Any, ...]:
    if payload.evaluate is None:
        return ()
    score = ScorePayload(candidate=version.name, evaluate=payload.evaluate, auto_promote=payload.auto_promote)
    return (lease.following(JobKind.SCORE, score),)
