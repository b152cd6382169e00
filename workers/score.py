"""The score job: visual dependence, and accuracy without most of the image, of the versions compared."""

from hscr.records import JobKind
from hscr.store.releases import BASE, add_dependence
from workers.contract import EvaluatePayload, ScorePayload
from workers.gpu import Event
from workers.leases import Done, Lease
from workers.services import Services


def score(services: Services, lease: Lease) -> Done:
    """Measure base, active and candidate on the same texts under the same masks; then have them judged.

    Each version's measure is kept as it comes, so that another attempt makes only what is missing.
    """
    payload = lease.payload(ScorePayload)
    releases = services.store.releases
    names = list(dict.fromkeys([None, releases.pointer().active, payload.candidate]))
    measured = releases.dependence(lease.job.id)  # by an earlier attempt

    def on_event(event: Event) -> None:
        name = event["version"]
        with lease.fenced() as connection:
            add_dependence(connection, lease.job.id, name, event["body"])
        measured[name or BASE] = event["body"]
        lease.report(len(measured), len(names), "versions")

    missing = [name for name in names if (name or BASE) not in measured]
    if missing:
        versions = [name and {"name": name, "digest": releases.adapter(name).digest} for name in missing]
        services.gpu.run(
            "score",
            {"versions": versions, "evaluate": payload.evaluate.resolved()},
            on_event=on_event,
            check=lease.check,
        )
    judge = EvaluatePayload(
        candidate=payload.candidate,
        score_job=lease.job.id,
        evaluate=payload.evaluate,
        auto_promote=payload.auto_promote,
    )
    summary = {name or BASE: measured[name or BASE]["visual_dependence"] for name in names}
    return Done({"visual_dependence": summary}, (lease.following(JobKind.EVALUATE, judge),))
