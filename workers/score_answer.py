"""The score_answer job: how much the image changed the words of one answer, judged by who gave it.

The GPU child makes visual tokens, whole and dropped; the engine that serves the answer's own version says how
probable each word is with either. No language model is loaded here.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

from sqlalchemy import Connection

from hscr.engine import ChatRequest, EngineClient, Expected, Message, VisualTokens
from hscr.errors import Conflict
from hscr.faults import fault_point
from hscr.records import Answer, Replica, TokenDependence, VisualDependence
from hscr.store.answers import add_answer_dependence, image_gone
from workers.asking import asked
from workers.contract import ScoreAnswerPayload
from workers.leases import Done, Lease
from workers.rollout import await_loaded
from workers.scratch import scratch
from workers.services import Services


def score_answer(services: Services, lease: Lease) -> Done:
    """Raises Gone without the image, Conflict when the answer came from another base model than is here."""
    payload = lease.payload(ScoreAnswerPayload)
    answer = services.store.answers.get(payload.answer_id)
    _require_image(services, answer)
    lease.hold(answer.provenance.adapter)
    with scratch(services, lease) as folder:
        seen = _seen(services, lease, payload, answer, folder)
        replica = _replica(services, lease, answer)
        fault_point("score-answer.seen")
        logprobs = asked(replica, lease, _score(replica, lease, answer, seen, folder))
    found = VisualDependence(
        **_judged(seen, logprobs),
        answer_id=answer.id,
        dropping=payload.dropping,
        model_digest=replica.model_digest,
        adapter=answer.provenance.adapter,
        adapter_digest=answer.provenance.adapter_digest,
        numeric_mode=replica.numeric_mode,
        vision_numeric_mode=seen["numeric_mode"],
        engine=replica.engine,
        job_id=lease.job.id,
    )

    def write(connection: Connection) -> None:
        add_answer_dependence(connection, found)

    return Done({"answer": answer.id, "visual_dependence": found.score}, write=write)


def _require_image(services: Services, answer: Answer) -> None:
    services.store.answers.require_image(answer)
    if not services.store.blobs.exists(answer.image.digest):
        raise image_gone()


def _seen(
    services: Services, lease: Lease, payload: ScoreAnswerPayload, answer: Answer, folder: Path
) -> dict[str, Any]:
    """What the GPU child saw and read (see `Workbench._see`); the visual tokens are files in `folder`."""
    arguments = {
        "image": answer.image.digest,
        "question": answer.question,
        "text": answer.text,
        "dropping": payload.dropping.model_dump(),
        "out": str(folder),
    }
    seen = services.gpu.run("see", arguments, on_event=lambda _: None, check=lease.check)
    _require_base(answer, seen["model_digest"], "this worker")
    return seen


def _replica(services: Services, lease: Lease, answer: Answer) -> Replica:
    version = answer.provenance.adapter
    replica = await_loaded(services, lease, *([] if version is None else [version]))[0]
    _require_base(answer, replica.model_digest, f"replica {replica.id}")
    return replica


def _require_base(answer: Answer, digest: str, where: str) -> None:
    if digest != answer.provenance.model_digest:
        raise Conflict(
            f"The answer came from another base model than {where} has.",
            remedy="Ask the question again, and have the new answer scored.",
        )


async def _score(
    replica: Replica, lease: Lease, answer: Answer, seen: dict[str, Any], folder: Path
) -> list[list[float]]:
    """Log-probs of the answer's tokens: with the whole image, then under each mask.

    One request after another: whoever waits for an answer goes first.
    """
    expected = Expected(prompt=seen["prompt"], answer=seen["answer"], image_token=seen["image_token"])
    messages = (Message(text=answer.question), Message(role="assistant", text=answer.text.strip()))
    found = []
    async with EngineClient(replica.address) as engine:
        for name in seen["files"]:
            image = VisualTokens(data=(folder / name).read_bytes(), rows=seen["rows"])
            model = answer.provenance.adapter or replica.model
            request = ChatRequest(model=model, messages=messages, image=image)
            found.append(await engine.score(request, expected))
            lease.report(len(found), len(seen["files"]), "scores")
    return found


def _judged(seen: dict[str, Any], logprobs: list[list[float]]) -> dict[str, Any]:
    """Score and tokens from log-probs [1 + masks, T], those with the whole image first."""
    full, *masked = logprobs
    dropped = [fmean(of_token) for of_token in zip(*masked, strict=True)]
    tokens = [
        TokenDependence(text=text, content=content, full=whole, dropped=less, difference=whole - less)
        for text, content, whole, less in zip(seen["texts"], seen["content"], full, dropped, strict=True)
    ]
    differences = [token.difference for token in tokens if token.content]
    return {"score": fmean(differences) if differences else 0.0, "tokens": tokens}
