"""Running suites into a folder: each arm once per seed, then per suite a table, a plot and all numbers.

out/arms/, out/records/     what was run, by digest; suites share it
out/<suite>/                table.md, results.json, plot.png
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from hscr.ablate.bench import Bench
from hscr.ablate.findings import Findings, findings
from hscr.ablate.plot import plot
from hscr.ablate.report import markdown
from hscr.ablate.results import ArmRun
from hscr.ablate.setting import Setting
from hscr.ablate.suites import SUITES, Arm, SuiteName
from hscr.models.vlm import VLM

Progress = Callable[[float, int, str], None]
"""Called with arms done (a fraction while one runs), arms in all, and what is running."""
Kind = Callable[[VLM, Setting, Path], Bench]
"""A class of benches: what another process makes its own of."""
TABLE, RESULTS, PLOT = "table.md", "results.json", "plot.png"


class Task(NamedTuple):
    arm: Arm
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        """Arms of one name are one arm in every suite; the base model is the same under every seed."""
        return self.arm.name, self.seed if self.arm.trained else 0


def ablate(
    model: Path,
    suites: Sequence[SuiteName],
    setting: Setting,
    seeds: int,
    out: Path,
    *,
    jobs: int = 1,
    on_progress: Progress = lambda _done, _total, _what: None,
) -> list[Findings]:
    """Run what `out` does not hold yet, in `jobs` processes of one thread, and write each suite's findings.

    Raises InvalidConfig, InvalidRecord, NotFound, Conflict.
    """
    for name in suites:
        SUITES[name].require_defaults(setting.loop)
    tasks = [Task(arm, seed) for seed in range(seeds) for name in suites for arm in SUITES[name].arms]
    distinct = list({task.key: task for task in tasks}.values())
    bench = Bench(VLM.load(model), setting, out)
    runs = {task.key: run for task, run in run_all(bench, model, distinct, jobs, on_progress)}
    found = []
    for name in suites:
        ablation = SUITES[name]
        each = {arm.name: [runs[Task(arm, seed).key] for seed in range(seeds)] for arm in ablation.arms}
        found.append(findings(ablation, setting, bench.suite, each))
        _write(found[-1], out / name)
    return found


def _write(found: Findings, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plot(found, folder / PLOT)
    (folder / RESULTS).write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(markdown(found, PLOT), encoding="utf-8")


def run_all(
    bench: Bench,
    model: Path,
    tasks: Sequence[Task],
    jobs: int,
    on_progress: Progress = lambda _done, _total, _what: None,
) -> Iterator[tuple[Task, ArmRun]]:
    """What has been run, and then the rest as it ends."""
    known = [task for task in tasks if bench.has_run(*task)]
    missing = [task for task in tasks if not bench.has_run(*task)]
    here, elsewhere = (known, missing) if jobs > 1 else (known + missing, [])
    for done, task in enumerate(here):
        advance = partial(_advance, on_progress, done, len(tasks), task)
        yield task, bench.run(*task, advance)
        advance(1)
    for done, (task, run) in enumerate(_run_elsewhere(bench, model, elsewhere, jobs), start=len(here)):
        yield task, run
        _advance(on_progress, done, len(tasks), task, 1)


def _advance(on_progress: Progress, before: int, total: int, task: Task, share: float) -> None:
    on_progress(before + share, total, f"{task.arm.name}, seed {task.seed}")


def _run_elsewhere(
    bench: Bench, model: Path, tasks: Sequence[Task], jobs: int
) -> Iterator[tuple[Task, ArmRun]]:
    """In the order in which they end."""
    # A forked child would inherit the locks of torch's threads.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {
            pool.submit(_elsewhere, type(bench), model, bench.setting, bench.folder, task): task
            for task in tasks
        }
        try:
            for ended in as_completed(waiting):
                yield waiting[ended], ended.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _elsewhere(kind: Kind, model: Path, setting: Setting, folder: Path, task: Task) -> ArmRun:
    return _bench(kind, model, setting, folder).run(task.arm, task.seed)


@cache
def _bench(kind: Kind, model: Path, setting: Setting, folder: Path) -> Bench:
    """One per process: loading a model takes longer than asking it."""
    return kind(VLM.load(model), setting, folder)
