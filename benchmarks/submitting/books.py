"""The count afterwards: what clients were promised against what the database holds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select

from benchmarks.submitting.load import Submission
from hscr.records import JobState
from hscr.store.store import Store
from hscr.store.tables import idempotency_keys, job_events, jobs


@dataclass(frozen=True)
class Books:
    submitted: int
    accepted: int
    lost: int
    """promised by a 202, and not succeeded"""
    duplicated: int
    """a second job of one key, or a second success of one job"""
    attempts: int
    """beyond the first: what the kills made workers do again"""
    gaps: int
    """jobs whose events are not numbered 1, 2, 3, … or are more or fewer than the job counted"""


def count(store: Store, sent: Sequence[Submission]) -> Books:
    promised = [submission.job for submission in sent if submission.job is not None]
    with store.database.read() as connection:
        rows = {row.id: row for row in connection.execute(select(jobs))}
        keys = connection.execute(select(idempotency_keys.c.resource)).scalars().all()
        seqs = connection.execute(
            select(job_events.c.job_id, func.count(), func.max(job_events.c.seq)).group_by(
                job_events.c.job_id
            )
        ).all()
        succeeded = Counter(
            row.job_id
            for row in connection.execute(select(job_events).where(job_events.c.type == "state"))
            if row.data["state"] == JobState.SUCCEEDED
        )
    lost = [job for job in promised if job not in rows or rows[job].state != JobState.SUCCEEDED]
    twice = len(promised) - len(set(promised)) + sum(number - 1 for number in succeeded.values())
    return Books(
        submitted=len(sent),
        accepted=len(promised),
        lost=len(lost),
        duplicated=twice + len(rows) - len(keys) + len(rows.keys() - set(promised)),
        attempts=sum(row.attempt - 1 for row in rows.values()),
        gaps=sum(not number == last == rows[job].last_event for job, number, last in seqs)
        + len(rows) - len(seqs),
    )  # fmt: skip


def unfinished(store: Store) -> int:
    return store.jobs.count(JobState.QUEUED, JobState.RUNNING)
