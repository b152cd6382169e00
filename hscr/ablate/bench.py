"""Running one arm: dispreferred answers, an adapter, and what the model then says. Imports torch."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from hscr import __version__
from hscr.ablate.external import external
from hscr.ablate.results import ArmRun, Made, file_of, kept
from hscr.ablate.setting import Setting
from hscr.ablate.sources import Asked, asked
from hscr.ablate.suites import EXTERNAL, Arm
from hscr.answers import answer
from hscr.config import EvaluateConfig, FinetuneConfig, GenerateConfig
from hscr.contrast.generate import Skipped, generate
from hscr.errors import InvalidRecord
from hscr.evaluate.suites import Suite, load_suite
from hscr.learn.trainer import FinetuneResult, finetune
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord
from hscr.runs.model import attached

Progress = Callable[[float], None]
"""Called with the share of an arm that is done."""
_GENERATED, _TRAINED = 0.2, 0.9
_ARM = "arm"


@dataclass
class Bench:
    """A model, held-out questions, and the folder of what has been run; one per process."""

    vlm: VLM
    setting: Setting
    folder: Path

    @cached_property
    def suite(self) -> Suite:
        return load_suite(self.setting.loop.evaluate)

    def run(self, arm: Arm, seed: int, on_progress: Progress = lambda _share: None) -> ArmRun:
        """The arm under the seed, from the folder if it is there. The base model is the same for all seeds.

        Raises InvalidConfig, InvalidRecord when no question gave a record, Conflict.
        """
        identity = self.identity(arm, seed)
        make = self._trained if arm.trained else self._base
        with _one_thread():
            return kept(self._arms, ArmRun, identity, lambda: make(arm, seed, identity, on_progress))

    def has_run(self, arm: Arm, seed: int) -> bool:
        """Whether the folder holds it."""
        return file_of(self._arms, self.identity(arm, seed)).is_file()

    @property
    def _arms(self) -> Path:
        return self.folder / "arms"

    def identity(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Everything that the arm's answers depend on."""
        config = self.setting.arm(arm, seed)
        judged = config.evaluate.model_dump(mode="json", exclude={"gate", "concurrency"})
        if not arm.trained:
            return {"model": self._model, "evaluate": judged}
        training = {"finetune": config.finetune.resolved(), "steps": self.setting.steps}
        return {**self._made_by(arm, config.generate, seed), **training, "evaluate": judged}

    def _made_by(self, arm: Arm, config: GenerateConfig, seed: int) -> dict[str, Any]:
        drawn = self.setting.model_dump(mode="json", include={"records", "mix", "questions"})
        by = {"negatives": arm.negatives, "generate": config.resolved()}
        return {"model": self._model, "sources": drawn, "seed": seed, **by}

    @property
    def _model(self) -> dict[str, str]:
        vlm = self.vlm
        versions = {"mode": vlm.numeric_mode, "hscr": __version__}
        return {"digest": vlm.digest, "template": vlm.template_digest, **versions}

    def _base(self, _arm: Arm, _seed: int, identity: dict[str, Any], _on_progress: Progress) -> ArmRun:
        started = time.monotonic()
        answered = self._answers(None, self.setting.loop.evaluate)
        return ArmRun(identity=identity, **answered, seconds=time.monotonic() - started)

    def _sources(self, seed: int) -> list[Asked]:
        """What all arms of a seed are trained on the right answers of."""
        return list(asked(self.setting, seed))

    def _answers(self, adapter: str | None, config: EvaluateConfig) -> dict[str, Any]:
        """The fields of an `ArmRun` that say how a version answers."""
        return answer(self.vlm, adapter, self.suite, config)._asdict()

    def _trained(self, arm: Arm, seed: int, identity: dict[str, Any], on_progress: Progress) -> ArmRun:
        started, config = time.monotonic(), self.setting.arm(arm, seed)
        sources = self._sources(seed)
        made = self._made(arm, config.generate, seed, sources, _part(on_progress, 0, _GENERATED))
        if not made.records:
            raise InvalidRecord(
                " ".join([f"Arm {arm.name}, seed {seed}: no question gave a record.", *made.skipped]),
                remedy="Raise --records; a model that was not trained on phantoms may need other settings.",
            )
        with tempfile.TemporaryDirectory() as aside:
            adapter = Path(aside) / "adapter"
            then = _part(on_progress, _GENERATED, _TRAINED)
            result = self._train(config.finetune, made.records, sources, adapter, then)
            with attached(self.vlm, adapter, _ARM) as name:
                answered = self._answers(name, config.evaluate)
        return ArmRun(
            identity=identity,
            **answered,
            probability={r.source: fmean(y.mean_probability for y in r.rejected) for r in made.records},
            levels=dict(sorted(Counter(len(record.rejected) for record in made.records).items())),
            skipped=made.skipped,
            metrics=result.metrics,
            warnings=result.warnings,
            seconds=time.monotonic() - started,
        )

    def _made(
        self, arm: Arm, config: GenerateConfig, seed: int, sources: Sequence[Asked], on_progress: Progress
    ) -> Made:
        """Arms that differ in training alone share their records."""
        identity = self._made_by(arm, config, seed)

        def make() -> Made:
            if arm.negatives == EXTERNAL:
                return _sorted_out(identity, external(self.vlm, sources, config))
            pairs = [(each.source, each.image) for each in sources]
            advance = lambda done, _kept: on_progress(done / len(pairs))  # noqa: E731
            return _sorted_out(identity, generate(self.vlm, pairs, config, on_progress=advance))

        return kept(self.folder / "records", Made, identity, make)

    def _train(
        self,
        config: FinetuneConfig,
        records: Sequence[PreferenceRecord],
        sources: Sequence[Asked],
        out: Path,
        on_progress: Progress,
    ) -> FinetuneResult:
        images = {each.source.image_digest: each.image for each in sources}
        return finetune(
            self.vlm,
            [(record, images[record.image_digest]) for record in records],
            self.setting.finetune(config, len(records)),
            out_dir=out,
            on_progress=lambda step, steps, _metrics: on_progress(step / steps),
        )


def _part(on_progress: Progress, start: float, end: float) -> Progress:
    return lambda share: on_progress(start + (end - start) * share)


def _sorted_out(identity: dict[str, Any], outcomes: Iterator[PreferenceRecord | Skipped]) -> Made:
    records: list[PreferenceRecord] = []
    skipped: Counter[str] = Counter()
    for outcome in outcomes:
        if isinstance(outcome, Skipped):
            skipped[outcome.reason] += 1
        else:
            records.append(outcome)
    return Made(identity=identity, records=tuple(records), skipped=dict(sorted(skipped.items())))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread adds in one order, so that a result does not depend on the machine's number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
