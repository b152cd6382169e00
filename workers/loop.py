"""Whether a turn of the loop is due, and its start."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from hscr.records import Job, JobKind, JobState, now
from hscr.store.store import Store
from workers.contract import FinetunePayload, GeneratePayload
from workers.services import Services
from workers.settings import WorkerSettings

_UNFINISHED = (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True)
class Situation:
    """`last` is the newest generate job that a fine-tune was to follow."""

    moment: datetime
    last: Job | None
    new_sources: int
    busy: bool


def due(situation: Situation, settings: WorkerSettings) -> bool:
    """Enough new sources, long enough after the last turn, within the hours, and nothing running."""
    interval = timedelta(seconds=settings.finetune_min_interval_seconds)
    return (
        not situation.busy
        and situation.new_sources >= settings.finetune_threshold
        and (situation.last is None or situation.moment - situation.last.created_at >= interval)
        and within_hours(situation.moment.hour, settings.finetune_from_hour, settings.finetune_until_hour)
    )


def within_hours(hour: int, start: int, end: int) -> bool:
    """Whether `hour` (0-23) lies in [start, end); a start after the end spans midnight."""
    if start < end:
        return start <= hour < end
    return hour >= start or hour < end


def consider_finetune(services: Services) -> Job | None:
    """Start a turn if one is due; at most one follows the same last turn, however often this runs."""
    situation = observe(services.store)
    if not due(situation, services.settings):
        return None
    then = FinetunePayload(auto_promote=services.settings.auto_promote)
    job = Job(kind=JobKind.GENERATE, payload=GeneratePayload(then=then).stored())
    after = situation.last.id if situation.last else "nothing"
    return services.store.jobs.submit(job, idempotency=(f"loop-after-{after}", "loop"))


def observe(store: Store) -> Situation:
    turns = [job for job in store.jobs.page(kind=JobKind.GENERATE, limit=1000) if job.payload.get("then")]
    last = turns[0] if turns else None
    return Situation(
        moment=now(),
        last=last,
        new_sources=store.preferences.count_sources_since(last.created_at if last else None),
        busy=store.jobs.count(*_UNFINISHED) > 0,
    )
