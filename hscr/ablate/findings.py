"""What one suite found: what each arm was trained on, how it scores, what becomes of the paper's claims."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from hscr.ablate.measures import METRICS, Ordering, Values, difference, level, ordering
from hscr.ablate.paper import Mixed, statements
from hscr.ablate.results import ArmRun
from hscr.ablate.setting import Setting
from hscr.ablate.suites import HSCR, AblationSuite, SuiteName
from hscr.config import GateConfig
from hscr.evaluate.metrics import score
from hscr.evaluate.suites import Suite
from hscr.records import Interval, Record

Measured = dict[str, list[Values]]
"""Of one arm: per metric, its values under each seed."""


class Trained(Record):
    """One arm under one seed."""

    seed: int
    digest: str
    config: dict[str, Any] = Field(description="resolved; without epochs, which follow from the steps")
    records: int
    levels: dict[int, int] = Field(description="records by number of dispreferred answers")
    skipped: dict[str, int]
    metrics: dict[str, float] = Field(description="of training's last epoch")
    warnings: tuple[str, ...]
    scores: dict[str, float]


class ArmFindings(Record):
    name: str
    label: str
    scores: dict[str, Interval] = Field(description="mean over seeds")
    differences: dict[str, Interval] = Field(description="to the arm `hscr`, which has none")
    seeds: tuple[Trained, ...]


class Findings(Record):
    """Everything that a suite's table, plot and page are drawn from."""

    suite: SuiteName
    title: str
    table: str = Field(description="of the paper")
    setting: Setting
    questions: int = Field(description="held out")
    images: int
    arms: tuple[ArmFindings, ...]
    orderings: tuple[Ordering, ...]
    mixed: tuple[Mixed, ...] = Field(description="pairs that the paper's data sets order differently")


def findings(
    ablation: AblationSuite, setting: Setting, suite: Suite, runs: Mapping[str, Sequence[ArmRun]]
) -> Findings:
    """`runs` has each arm under each seed, in the seeds' order."""
    config = setting.loop.evaluate.gate
    arms = {name: _measured(each, suite) for name, each in runs.items()}
    claims, mixed = statements(ablation)
    by_metric = {metric: {name: arms[name][metric] for name in arms} for metric in METRICS}
    return Findings(
        suite=ablation.name,
        title=ablation.title,
        table=ablation.table,
        setting=setting,
        questions=len(suite.items),
        images=len({item.image_cluster for item in suite.items}),
        arms=tuple(
            ArmFindings(
                name=arm.name,
                label=arm.label,
                scores=_present({name: level(arms[arm.name][name], config) for name in METRICS}),
                differences={} if arm.name == HSCR else _differences(arms[arm.name], arms[HSCR], config),
                seeds=tuple(
                    _trained(seed, run, arms[arm.name], config) for seed, run in enumerate(runs[arm.name])
                ),
            )
            for arm in ablation.arms
        ),
        orderings=tuple(ordering(claim, by_metric[claim.metric], config) for claim in claims),
        mixed=tuple(mixed),
    )


def _measured(runs: Sequence[ArmRun], suite: Suite) -> Measured:
    scored = [(run, [score(item, run.answers[item.id]) for item in suite.items]) for run in runs]
    return {
        name: [metric.values(run, outcomes) for run, outcomes in scored] for name, metric in METRICS.items()
    }


def _differences(arm: Measured, reference: Measured, config: GateConfig) -> dict[str, Interval]:
    return _present({name: difference(arm[name], reference[name], config) for name in METRICS})


def _trained(seed: int, run: ArmRun, arm: Measured, config: GateConfig) -> Trained:
    scores = _present({name: level([values[seed]], config) for name, values in arm.items()})
    made_by = {key: run.identity[key] for key in ("generate", "finetune", "negatives") if key in run.identity}
    return Trained(
        seed=seed,
        digest=run.digest,
        config=made_by,
        records=run.records,
        levels=run.levels,
        skipped=run.skipped,
        metrics=run.metrics,
        warnings=run.warnings,
        scores={name: score.mean for name, score in scores.items()},
    )


def _present(found: Mapping[str, Interval | None]) -> dict[str, Interval]:
    return {name: value for name, value in found.items() if value is not None}
