"""The generate job: dispreferred answers for sources that have none yet."""

from typing import Any

from hscr.faults import fault_point
from hscr.records import JobKind, PreferenceRecord, PreferenceSource
from hscr.store.preferences import add_record, add_skip
from hscr.store.store import Store
from workers.contract import GeneratePayload
from workers.gpu import Event
from workers.leases import Done, Lease
from workers.services import Services


def generate(services: Services, lease: Lease) -> Done:
    """Make and keep records in small fenced transactions, so that another attempt goes on where one ended.

    What the active adapter would say is what it should learn not to say, so the records are made with it,
    and name it.
    """
    payload = lease.payload(GeneratePayload)
    store = services.store
    sources = _sources(store, payload)
    active = store.releases.pointer().active
    lease.hold(active)
    made = _Writer(services, lease, payload, len(sources))
    try:
        if sources:
            services.gpu.run(
                "generate",
                {
                    "sources": [source.model_dump(mode="json") for source in sources],
                    "config": payload.config.resolved(),
                    "adapter": active and {"name": active, "digest": store.releases.adapter(active).digest},
                },
                on_event=made.take,
                check=lease.check,
            )
    finally:
        made.flush()  # what was made is kept, whatever ended the attempt
    then = (lease.following(JobKind.FINETUNE, payload.then),) if payload.then else ()
    return Done(_counts(store, lease.job.id, active), then)


def _sources(store: Store, payload: GeneratePayload) -> list[PreferenceSource]:
    """Consented sources that this configuration made nothing of yet; of the named ones, if any are named."""
    pending = store.preferences.pending(payload.config.digest)
    if payload.source_ids is None:
        return pending
    named = set(payload.source_ids)
    return [source for source in pending if source.id in named]


class _Writer:
    """Collects what the child made and writes it by the batch."""

    def __init__(self, services: Services, lease: Lease, payload: GeneratePayload, total: int) -> None:
        self._lease = lease
        self._config_digest = payload.config.digest
        self._size = services.settings.write_every
        self._total = total
        self._done = 0
        self._records: list[PreferenceRecord] = []
        self._skips: list[tuple[str, str]] = []

    def take(self, event: Event) -> None:
        if event["event"] == "record":
            record = PreferenceRecord.model_validate(event["record"])
            self._records.append(record.but(job_id=self._lease.job.id))
        elif event["event"] == "skip":
            self._skips.append((event["source"], event["reason"]))
        if len(self._records) + len(self._skips) >= self._size:
            self.flush()

    def flush(self) -> None:
        job_id = self._lease.job.id
        fault_point("generate.batch")
        with self._lease.fenced() as connection:
            for record in self._records:
                add_record(connection, record)
            for source, reason in self._skips:
                add_skip(connection, source, self._config_digest, job_id, reason)
            fault_point("generate.written")
        fault_point("generate.kept")
        self._done += len(self._records) + len(self._skips)
        self._records, self._skips = [], []
        self._lease.report(self._done, self._total, "sources")


def _counts(store: Store, job_id: str, active: str | None) -> dict[str, Any]:
    """Of all attempts of the job together."""
    skipped = store.preferences.skipped(job_id)
    records = store.preferences.count(job_id=job_id)
    return {"records": records, "skipped": len(skipped), "adapter": active}
