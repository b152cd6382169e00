"""`make bench-align`: six ways to train on the same records, against the base model, over seeds.

Two settings. *Paper*: right answers to questions from the distribution that the model was trained on.
*Online*: a ward's traffic as in the demo; what the base model answers rightly is accepted as it says it, and
what it answers wrongly is corrected by a reviewer who knows the truth. In both, HSCR makes records of those
questions once a seed, and every arm is trained on them: the same questions, preferred answers, order, first
LoRA weights, number of optimiser steps and, for all, the one learning rate of decision 5, which was chosen on
the development split. Questions of the test split are asked once everything is fixed.

- base: the model without an adapter, the same under all seeds
- SFT: the NLL per token of the preferred answers, and nothing else
- random negatives: HSCR's loss; as many dispreferred answers as HSCR has, but preferred answers to other
  questions of the same kind that say something else, drawn uniformly and ordered by similarity (fewer where
  there are fewer; HSCR's where all questions of the kind have one answer)
- DPO: Eq. 2, -log σ(γ(r_w - r_l)), on one pair a record: the preferred answer and the least similar, most
  dispreferred of HSCR's
- explicit, implicit: HSCR's loss with L_E or L_I alone (Eqs. 5, 6); where a record has one level L_I is 0
- HSCR: L_E + L_I

The recipe's NLL term on preferred answers (weight 5; the paper has none) stands beside every preference loss;
`--nll-weight 0` takes it from all of them. Intervals are 95 %, paired by question and seed; images and, from
two seeds on, seeds are resampled (`hscr.evaluate.gate.interval`).

A cell (one arm under one seed) that is in the folder is not run again, so a killed run goes on where it was.
After each seed the tables and the plot are written with the seeds that are complete.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.aligning.arms import ARMS, ONLINE, AlignBench
from benchmarks.aligning.drawing import draw
from benchmarks.aligning.findings import Findings, Runs, findings, line, markdown
from hscr.ablate.results import ArmRun
from hscr.ablate.run import Task, run_all
from hscr.ablate.setting import Setting
from hscr.config import LoopConfig
from hscr.models.vlm import VLM
from hscr.stack import PHANTOM

SETTINGS = {"paper": "training", "online": ONLINE}
"""and the mix of each"""
Done = dict[tuple[str, int], ArmRun]
"""By arm and seed."""


class Clock:
    """Says how many cells are done and how long the rest will take at the pace of those run here."""

    def __init__(self, total: int, known: int) -> None:
        self._total, self._known, self._done = total, known, 0
        self._began = time.monotonic()

    def tick(self, what: str) -> None:
        self._done += 1
        fresh = self._done - self._known
        if fresh <= 0:
            return
        pace = (time.monotonic() - self._began) / fresh
        left = (self._total - self._done) * pace / 60
        print(
            f"  {self._done} of {self._total} cells ({what}); {pace:.0f} s each, {left:.0f} min left",
            flush=True,
        )


def setting(mix: str, options: argparse.Namespace) -> Setting:
    loop = LoopConfig.parse(
        {
            "finetune": {"nll_weight": options.nll_weight},
            "evaluate": {
                "split": "test",
                "images": options.images,
                "dependence_questions": options.dependence,
            },
        }
    )
    return Setting(records=options.records, mix=mix, steps=options.steps, loop=loop)


def measure(
    options: argparse.Namespace, on_seed: Callable[[dict[str, AlignBench], dict[str, Done], int], None]
) -> None:
    """Run all cells seed by seed, so that a run cut short has whole seeds; `on_seed` hears how many."""
    vlm = VLM.load(PHANTOM)
    benches = {name: AlignBench(vlm, setting(mix, options), options.out) for name, mix in SETTINGS.items()}
    tasks = [
        list({Task(arm, seed).key: Task(arm, seed) for arm in ARMS}.values()) for seed in range(options.seeds)
    ]
    every = [(name, task) for each in tasks for name in SETTINGS for task in each]
    clock = Clock(len(every), sum(benches[name].has_run(*task) for name, task in every))
    done: dict[str, Done] = {name: {} for name in SETTINGS}
    for seed, each in enumerate(tasks):
        for name, bench in benches.items():
            for task, run in run_all(bench, PHANTOM, each, options.jobs):
                done[name][task.arm.name, seed] = run
                clock.tick(f"{name}, {task.arm.label}, seed {seed}")
        on_seed(benches, done, seed + 1)


def gathered(done: Done, seeds: int) -> Runs:
    return {arm.name: [done[arm.name, seed] for seed in range(seeds)] for arm in ARMS}


def write(
    benches: dict[str, AlignBench], done: dict[str, Done], seeds: int, options: argparse.Namespace
) -> list[dict[str, object]]:
    """Tables and plot of the seeds so far; returns each setting's line."""
    found: dict[str, Findings] = {}
    lines = []
    for name, bench in benches.items():
        runs = gathered(done[name], seeds)
        found[name] = findings(bench.suite, runs, bench.setting.loop.evaluate.gate)
        (options.out / f"{name}.md").write_text(markdown(bench.suite, found[name], runs), encoding="utf-8")
        lines.append(line(name, bench.suite, found[name], runs))
    draw(options.plot or options.out / "align.png", found)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=Path(".hscr/bench-align"), help="state; a run goes on in it"
    )
    parser.add_argument("--plot", type=Path, help="PNG to draw into, beside the one in the folder by default")
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, each in a process of one thread")
    parser.add_argument("--records", type=int, default=600, help="questions to make records of, per seed")
    parser.add_argument(
        "--steps", type=int, default=60, help="optimiser steps of 16 records, every trained arm"
    )
    parser.add_argument("--images", type=int, default=80, help="balanced test images, about 8 questions each")
    parser.add_argument("--dependence", type=int, default=96, help="questions scored for visual dependence")
    parser.add_argument("--nll-weight", type=float, default=LoopConfig().finetune.nll_weight)
    options = parser.parse_args()
    lines: list[dict[str, object]] = []

    def on_seed(benches: dict[str, AlignBench], done: dict[str, Done], seeds: int) -> None:
        lines[:] = write(benches, done, seeds, options)
        print(f"  {seeds} of {options.seeds} seeds: tables in {options.out}", flush=True)

    measure(options, on_seed)
    for each in lines:
        print(json.dumps(each))


if __name__ == "__main__":
    main()
