"""The score job: visual dependence, and accuracy without most of the image, of the versions compared."""

from typing import Any

from sqlalchemy import Connection

from hscr.records import JobKind
from hscr.store.releases import add_dependence
from workers.contract import EvaluatePayload, ScorePayload
from workers.gpu import Event
from workers.leases import Done, Lease
from workers.services import Services


def score(services: Services, lease: Lease) -> Done:
    """Measure base, active and candidate on the same texts under the same masks; then have them judged."""
    payload = ScorePayload.model_validate(lease.job.payload)
    releases = services.store.releases
    names = list(dict.fromkeys([None, releases.pointer().active, payload.candidate]))

    def on_event(event: Event) -> None:
        lease.report(event["done"], event["total"], "versions")

    versions = [name and {"name": name, "digest": releases.adapter(name).digest} for name in names]
    measured = services.gpu.run(
        "score",
        {"versions": versions, "evaluate": payload.evaluate.resolved()},
        on_event=on_event,
        check=lease.check,
    )
    bodies: dict[str | None, dict[str, Any]] = dict(zip(names, measured["scores"], strict=True))

    def write(connection: Connection) -> None:
        for name, body in bodies.items():
            add_dependence(connection, lease.job.id, name, body)

    judge = EvaluatePayload(
        candidate=payload.candidate,
        score_job=lease.job.id,
        evaluate=payload.evaluate,
        auto_promote=payload.auto_promote,
    )
    summary = {name or "base": body["visual_dependence"] for name, body in bodies.items()}
    return Done({"visual_dependence": summary}, (lease.following(JobKind.EVALUATE, judge),), write)
