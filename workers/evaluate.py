"""The evaluate job: the suite through the engine that serves, and the gate's verdict."""

import asyncio
import io
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image
from sqlalchemy import Connection

from hscr.engine import ChatRequest, EngineClient
from hscr.errors import Conflict
from hscr.evaluate.gate import Measured, judge
from hscr.evaluate.metrics import ACCURACY, MACRO, summarise
from hscr.evaluate.outcome import Outcome
from hscr.evaluate.run import Answer, run
from hscr.evaluate.suites import Suite, SuiteItem, load_suite
from hscr.faults import fault_point
from hscr.records import Evaluation, GateVerdict, JobKind, Replica
from hscr.store.blobs import bytes_digest
from hscr.store.releases import BASE, add_evaluation
from workers.asking import asked
from workers.checkpoints import Answers, Kept
from workers.contract import EvaluatePayload, ReleasePayload
from workers.leases import Done, Lease
from workers.rollout import await_loaded
from workers.services import Services


@dataclass(frozen=True)
class _Answers:
    """One version's outcomes on the suite, with its images and with blank ones."""

    full: list[Outcome]
    blank: list[Outcome]


def evaluate(services: Services, lease: Lease) -> Done:
    """What is judged is what is served: candidate, active and base answer through a live replica.

    Answers are kept as they come, so that another attempt asks only for the others.
    """
    payload = lease.payload(EvaluatePayload)
    active = services.store.releases.pointer().active
    dependence = services.store.releases.dependence(payload.score_job)
    _require_scored(dependence, payload.candidate, active)
    names = [payload.candidate, *([active] if active and active != payload.candidate else [])]
    for name in names:
        lease.hold(name)
    replica = await_loaded(services, lease, *names)[0]
    fault_point("evaluate.loaded")
    suite = load_suite(payload.evaluate)
    kept = Kept.take_over(services.store, lease)
    work = _ask_versions(
        replica, suite, [*names, None], lease, kept.answers, concurrency=payload.evaluate.concurrency
    )
    with kept.shared_if_interrupted():
        answers = asked(replica, lease, work)
    judgement = judge(
        Measured(answers[payload.candidate].full, dependence[payload.candidate]["dependence"]),
        Measured(answers[active].full, dependence[active or BASE]["dependence"]),
        payload.evaluate.gate,
        seed=payload.evaluate.seed,
    )
    scores = {name or BASE: _scores(answers[name], dependence[name or BASE]) for name in answers}
    evaluation = Evaluation(
        job_id=lease.job.id,
        candidate=payload.candidate,
        active=active,
        suite=suite.name,
        questions=len(suite.items),
        images=len({item.image_cluster for item in suite.items}),
        scores=scores,
        **judgement._asdict(),
        config=payload.evaluate.resolved(),
    )
    outcomes = {name or BASE: [asdict(outcome) for outcome in answers[name].full] for name in answers}
    result = {"evaluation": evaluation.id, "verdict": evaluation.verdict, "reasons": list(evaluation.reasons)}

    def write(connection: Connection) -> None:
        add_evaluation(connection, evaluation, outcomes)

    return Done(result, _then(lease, payload, evaluation), write)


def _require_scored(dependence: dict[str, Any], candidate: str, active: str | None) -> None:
    if not {candidate, active or BASE, BASE} <= dependence.keys():
        raise Conflict(
            "The visual dependence of the candidate or of the active version was not measured.",
            remedy="Another version became active meanwhile: submit the evaluation again.",
        )


async def _ask_versions(
    replica: Replica,
    suite: Suite,
    names: list[str | None],
    lease: Lease,
    kept: Answers,
    *,
    concurrency: int,
) -> dict[str | None, _Answers]:
    size = len(suite.items)
    rounds = iter(range(2 * len(names)))

    async def ask(answer: Answer) -> list[Outcome]:
        before = next(rounds) * size

        def on_progress(done: int, _total: int) -> None:
            lease.report(before + done, 2 * len(names) * size, "answers")

        return await run(suite, answer, concurrency=concurrency, on_progress=on_progress)

    answers: dict[str | None, _Answers] = {}
    async with EngineClient(replica.address) as engine:
        for name in names:
            asked = _Asked(engine, name or replica.model, replica.model_digest, kept)
            answers[name] = _Answers(await ask(asked.full), await ask(asked.blank))
    return answers


class _Asked:
    """Greedy answers of one version. Without an image, equal questions have equal answers."""

    def __init__(self, engine: EngineClient, model: str, base: str, kept: Answers) -> None:
        """base: the digest of the model that an adapter changes."""
        self._engine = engine
        self._model = model
        self._base = base
        self._kept = kept
        self._blank: dict[tuple[str, bytes], asyncio.Task[str]] = {}

    async def full(self, item: SuiteItem) -> str:
        return await self._ask(item.question, item.image_png)

    async def blank(self, item: SuiteItem) -> str:
        key = (item.question, _blank(item.image_png))
        if key not in self._blank:
            self._blank[key] = asyncio.ensure_future(self._ask(*key))
        return await asyncio.shield(self._blank[key])

    async def _ask(self, question: str, image: bytes) -> str:
        key = bytes_digest("\0".join([self._base, self._model, question, bytes_digest(image)]).encode())
        known = self._kept.get(key)
        if known is not None:
            return known
        text = (await self._engine.chat(ChatRequest.ask(self._model, question, image))).text
        self._kept.add(key, text)
        return text


def _blank(png: bytes) -> bytes:
    """A black image of the same size."""
    with Image.open(io.BytesIO(png)) as image:
        size = image.size
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, format="PNG")
    return buffer.getvalue()


def _scores(answers: _Answers, measured: dict[str, Any]) -> dict[str, float]:
    """All metrics of one version; `_blank` and `_dropped` are the same scores without (most of) the image."""
    blank = summarise(answers.blank)
    return {
        **summarise(answers.full),
        **{f"{metric}_blank": blank[metric] for metric in (MACRO, ACCURACY)},
        **{name: value for name, value in measured.items() if isinstance(value, float)},
    }


def _then(lease: Lease, payload: EvaluatePayload, evaluation: Evaluation) -> tuple[Any, ...]:
    if not payload.auto_promote or evaluation.verdict is not GateVerdict.PASS:
        return ()
    release = ReleasePayload(
        version_name=payload.candidate,
        evaluation_id=evaluation.id,
        actor="auto_promote",
        reason="the gate passed",
    )
    return (lease.following(JobKind.RELEASE, release),)
