"""The demo in the order in which it happens."""

import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hscr.client import Client
from hscr.config import EvaluateConfig, FinetuneConfig, GateConfig, GenerateConfig, SubstituteConfig
from hscr.demo import report, ward
from hscr.demo.swap import Streams, Telling, telling_questions
from hscr.errors import HscrError
from hscr.evaluate.gate import Measured, compare
from hscr.records import (
    AdapterVersion,
    Evaluation,
    GateVerdict,
    Interval,
    Job,
    JobKind,
    PreferenceRecord,
    Role,
)
from hscr.stack import PHANTOM, Ports, Stack
from hscr.store.settings import StoreSettings
from hscr.store.store import Store

AFTER_SWAP = 50
"""answers by the new version before the clients stop"""
SWAP_DEADLINE = 60.0
_SETTINGS = {
    "HSCR_AUTO_PROMOTE": "true",  # off everywhere but here
    "HSCR_FINETUNE_THRESHOLD": "1000000",  # the demo starts each step itself, to tell it
}
GIGABYTE = 1 << 30


@dataclass(frozen=True)
class Plan:
    """How much of everything the demo does; everything random follows from `seed`."""

    home: Path
    images: int = 240
    questions_per_image: int = 5
    test_images: int = 70
    seed: int = 0

    @property
    def evaluation(self) -> EvaluateConfig:
        return EvaluateConfig(split="test", images=self.test_images, seed=self.seed, dependence_questions=96)


@dataclass(frozen=True)
class Keys:
    client: str
    reviewer: str
    operator: str


@dataclass(frozen=True)
class Arm:
    """One way to train on the same corrections, and how it was judged."""

    name: str
    adapter: AdapterVersion
    evaluation: Evaluation


def tell(plan: Plan, console: Console) -> dict[str, Any]:
    """Run the whole demo; returns the values of its last line. Raises HscrError with what to do."""
    began = time.time()
    story = report.Story(console)
    story.seconds["install"] = round(began - float(os.environ.get("HSCR_STARTED", began)), 1)
    console.print("[bold]HSCR: a medical vision-language model that learns to look[/]")
    story.say("Research software. Not for clinical care or any clinical decision.")
    with _stack(story, plan) as stack:
        keys = _keys(plan.home)
        with Client(stack.url, keys.client) as asking, Client(stack.url, keys.operator) as operating:
            _first_answers(story, asking)
            answered = _traffic(story, plan, asking, Client(stack.url, keys.reviewer))
            records = _preferences(story, operating)
            controls = _controls(story, plan, operating)
            main = _finetune(story, operating)
            streams = Streams(stack.url, keys.client, _telling(story, plan, main))
            with streams:
                aligned = _judge(story, plan, operating, main)
                promoted = _release(story, operating, aligned, streams)
            _swapped(story, streams)
            _lineage(story, asking, streams)
            _effect(story, operating, aligned, controls)
            _memory(story, stack)
    story.seconds["total"] = round(time.time() - began + story.seconds["install"], 1)
    made = {"answered": answered, "preference_records": records, "promoted": promoted}
    return made | _values(story, aligned, controls, streams)


# -- the acts ------------------------------------------------------------------------------------------------


@contextmanager
def _stack(story: report.Story, plan: Plan) -> Iterator[Stack]:
    with story.act("1. Start everything: Redis, engine, agent, gateway, relay, workers, beat", "start"):
        ports = Ports(gateway=0)
        stack = Stack(plan.home, ports=ports, model=PHANTOM, settings=_SETTINGS)
        stack.start()
        story.say(f"gateway {stack.url}, state and logs in {plan.home}")
    try:
        yield stack
    finally:
        stack.stop()


def _keys(home: Path) -> Keys:
    """Three people: who asks (and consents to training), who reviews, who operates."""
    with Store.open(StoreSettings(home=home)) as store:
        _, client = store.keys.create("demo ward", Role.CLIENT, train_consent=True)
        _, reviewer = store.keys.create("demo reviewer", Role.REVIEWER, train_consent=True)
        _, operator = store.keys.create("demo operator", Role.OPERATOR)
    return Keys(client, reviewer, operator)


def _first_answers(story: report.Story, asking: Client) -> None:
    with story.act("2. Ask about real images"):
        for number, (what, data, question) in enumerate(ward.real_images()):
            began = time.monotonic()
            answer = asking.ask(data, question)
            if number == 0:
                story.seconds["first_answer"] = round(time.monotonic() - began, 2)
            story.say(f"{what}: “{question}” → [bold]{answer.text}[/]  [dim]{answer.image.recipe.name}[/]")
        story.say(
            "(The embedded model only knows synthetic phantoms: what it says of real images means nothing.)"
        )


def _traffic(story: report.Story, plan: Plan, asking: Client, reviewing: Client) -> int:
    examples = ward.traffic(plan.images, plan.questions_per_image, plan.seed)
    with story.act(f"3. {len(examples)} questions of a ward; a reviewer accepts or corrects each answer"):
        with reviewing, story.progress() as progress:
            bar = progress.add_task("asked and judged", total=len(examples))
            judged = ward.rounds(asking, reviewing, examples, lambda _: progress.advance(bar))
        wrong = [case for case in judged if not case.right]
        for case in random.Random(plan.seed).sample(wrong, min(3, len(wrong))):  # noqa: S311 - a choice to show
            story.say(
                f"“{case.example.question}” → [red]{case.answer.text}[/]  reviewer: {case.example.answer}"
            )
        story.say(f"accepted {len(judged) - len(wrong)}, corrected {len(wrong)}")
    return len(judged)


def _preferences(story: report.Story, operating: Client) -> int:
    with story.act("4. Turn the judgements into preference records", "generate"):
        job = story.follow(operating, operating.generate(GenerateConfig()), "dispreferred answers")
        records = list(operating.preferences(method="hscr"))
        _show_record(story, max(records, key=lambda record: len(record.rejected)))
        story.say(
            f"{len(records)} records by job {job.id[:12]}…; the other answers had no plausible wrong twin"
        )
    with story.act("   … and, as a control, random substitutes for the same answers"):
        random_substitutes = GenerateConfig(substitute=SubstituteConfig(negatives="random"))
        sources = [record.source for record in records]
        story.follow(operating, operating.generate(random_substitutes, source_ids=sources), "random")
        story.say(f"{len(list(operating.preferences(method='random')))} records")
    return len(records)


def _show_record(story: report.Story, record: PreferenceRecord) -> None:
    story.say(f"“{record.question}”  preferred: [green]{record.chosen}[/]")
    for level, response in enumerate(record.rejected, start=1):
        story.say(f"   level {level}: [red]{response.text}[/]  similarity {response.similarity:.2f}")


def _controls(story: report.Story, plan: Plan, operating: Client) -> list[Arm]:
    arms = []
    with story.act("5. Two controls at equal budget: plain SFT, and the same loss with random substitutes"):
        for name, method, config in (
            ("SFT", "hscr", FinetuneConfig(objective="sft")),
            ("random", "random", FinetuneConfig()),
        ):
            submitted = operating.finetune(config, method=method, evaluate=plan.evaluation)
            trained = story.follow(operating, submitted, f"{name}: fine-tune")
            evaluation = _follow_evaluation(story, operating, trained, f"{name}: ")
            arms.append(Arm(name, _adapter(operating, trained), evaluation))
    return arms


def _finetune(story: report.Story, operating: Client) -> AdapterVersion:
    with story.act("6. Fine-tune: LoRA rank 16 from the base model on all records", "finetune"):
        trained = story.follow(
            operating, operating.finetune(FinetuneConfig(), evaluate=None), "HSCR: fine-tune"
        )
        adapter = _adapter(operating, trained)
        wanted = ("rewards/accuracies", "rewards/margins", "logratio/chosen")
        story.say(f"{adapter.name}: {report.mean_chosen(wanted, adapter.metrics)}")
        story.say(f"(NLL weight {FinetuneConfig().nll_weight}; the paper has none)")
    return adapter


def _telling(story: report.Story, plan: Plan, adapter: AdapterVersion) -> list[Telling]:
    with story.act("7. Questions that tell the old version from the new, answered by transformers + PEFT"):
        examples = ward.traffic(100, 4, plan.seed + 1)
        folder = Store.open(StoreSettings(home=plan.home)).blobs.folder(adapter.digest)
        questions = telling_questions(PHANTOM, folder, examples, wanted=24)
        if not questions:
            raise HscrError(
                "The new adapter answers nothing differently.", remedy="Train on more corrections."
            )
        story.say(f"{len(questions)} questions; two clients now stream them without pause")
    return questions


def _judge(story: report.Story, plan: Plan, operating: Client, adapter: AdapterVersion) -> Arm:
    with story.act("8. Judge it on the balanced test split, through the engine that serves", "evaluate"):
        job = operating.evaluate(adapter.name, plan.evaluation, auto_promote=True)
        evaluation = _follow_evaluation(story, operating, None, "", score=job)
        for reason in evaluation.reasons:
            story.say(f"- {reason}")
        story.say(report.verdict(evaluation))
    return Arm("HSCR", adapter, evaluation)


def _release(story: report.Story, operating: Client, aligned: Arm, streams: Streams) -> bool:
    """Flip to the new version: by the gate, or by the operator's override. Whether it serves at the end."""
    with story.act("9. Swap it in under running traffic", "release"):
        story.follow(operating, _release_job(story, operating, aligned), "load, probe, flip")
        if not streams.until_new(AFTER_SWAP, SWAP_DEADLINE):
            raise HscrError(
                "The streams are not answered by the new version after its release.",
                remedy="Read the gateway's and the agent's logs in the state folder.",
            )
        active = operating.pointer().active
        story.say(f"active: [bold]{active}[/]")
    return active == aligned.adapter.name


def _release_job(story: report.Story, operating: Client, aligned: Arm) -> Job:
    if aligned.evaluation.verdict is GateVerdict.PASS:
        return _next(operating, operating.job(aligned.evaluation.job_id or ""))
    story.say("[yellow]The gate did not pass. To show the swap, the operator overrides it, on record.[/]")
    return operating.promote(aligned.adapter.name, reason="demonstration of the swap", override=True)


def _swapped(story: report.Story, streams: Streams) -> None:
    counts = ", ".join(f"{count} by the {name} version" for name, count in streams.versions.items())
    story.say(
        f"{streams.requests} streamed answers around the swap: {counts}; failed: [bold]{streams.failed}[/]"
    )
    for failure in streams.failures[:3]:
        story.say(f"[red]{failure}[/]")


def _lineage(story: report.Story, asking: Client, streams: Streams) -> None:
    if streams.last is None:
        return
    line = asking.lineage(streams.last.id)
    made_by = streams.last.provenance
    story.say(
        f"lineage of its last answer: image {streams.last.image.digest[:12]}…, recipe {made_by.recipe.name}, "
        f"base {made_by.model_digest[:12]}…, adapter {made_by.adapter}, {len(line['trained_on'])} records, "
        f"{len(line['evaluations'])} evaluation(s), {len(line['promotions'])} promotion(s)"
    )


def _effect(story: report.Story, operating: Client, aligned: Arm, controls: Sequence[Arm]) -> None:
    story.console.print()
    story.console.print(report.comparison(_columns(aligned, controls)))
    story.say(f"HSCR − base: {report.shown(aligned.evaluation.differences['macro_score'])}")
    for arm in controls:
        story.say(f"HSCR − {arm.name}: {report.shown(_against(operating, aligned, arm))}")
    story.say("HSCR is credited only with its difference to the controls, not with what any training gives.")
    for arm in (aligned, *controls):
        wanted = ("logratio/chosen", "rewards/margins", "rewards/accuracies")
        story.say(f"{arm.name}: {report.mean_chosen(wanted, arm.adapter.metrics)}")


def _memory(story: report.Story, stack: Stack) -> None:
    story.say(f"memory of the whole stack: {stack.memory() / GIGABYTE:.2f} GB")


# -- what the acts share -------------------------------------------------------------------------------------


def _follow_evaluation(
    story: report.Story, operating: Client, trained: Job | None, prefix: str, *, score: Job | None = None
) -> Evaluation:
    """Follow score and evaluate, which a fine-tune or an evaluation request started."""
    job = score or _next(operating, trained)
    story.follow(operating, job, f"{prefix}visual dependence")
    judged = story.follow(operating, _next(operating, job), f"{prefix}questions to the engine")
    assert judged.result is not None
    return operating.evaluation(judged.result["evaluation"])


def _next(operating: Client, job: Job | None) -> Job:
    following = operating.next_job(job.id) if job else None
    assert following is not None, "each step submits the next in the transaction of its own result"
    return following


def _adapter(operating: Client, trained: Job) -> AdapterVersion:
    assert trained.kind is JobKind.FINETUNE
    assert trained.result is not None
    return next(version for version in operating.adapters() if version.name == trained.result["adapter"])


def _columns(aligned: Arm, controls: Sequence[Arm]) -> dict[str, Mapping[str, float]]:
    base = aligned.evaluation.scores["base"]
    arms = {arm.name: arm.evaluation.scores[arm.adapter.name] for arm in (aligned, *controls)}
    return {"base": base, **arms}


def _against(operating: Client, aligned: Arm, arm: Arm) -> Interval:
    """Paired difference HSCR − control on the same questions."""
    ours = operating.outcomes(aligned.evaluation.id)[aligned.adapter.name]
    theirs = operating.outcomes(arm.evaluation.id)[arm.adapter.name]
    return compare(Measured(ours), Measured(theirs), GateConfig())["macro_score"]


def _values(story: report.Story, aligned: Arm, controls: Sequence[Arm], streams: Streams) -> dict[str, Any]:
    columns = _columns(aligned, controls)
    difference = aligned.evaluation.differences["macro_score"]
    order = ("install", "start", "first_answer", "generate", "finetune", "evaluate", "release", "total")
    return {
        "adapter": aligned.adapter.name,
        "gate": str(aligned.evaluation.verdict),
        "base_score": columns["base"]["macro_score"],
        "aligned_score": columns["HSCR"]["macro_score"],
        "difference_ci95": [difference.low, difference.high],
        "sft_score": columns["SFT"]["macro_score"],
        "random_negatives_score": columns["random"]["macro_score"],
        "visual_dependence_base": columns["base"]["visual_dependence"],
        "visual_dependence_aligned": columns["HSCR"]["visual_dependence"],
        "requests_during_swap": streams.requests,
        "failed_during_swap": streams.failed,
        "seconds": {name: story.seconds[name] for name in order},
    }
