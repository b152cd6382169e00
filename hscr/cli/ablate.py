"""`hscr ablate`: the paper's ablations on phantoms; `hscr recipes`: the configurations that come with it."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from hscr.ablate.setting import Setting
from hscr.ablate.suites import SuiteName
from hscr.cli.common import AsJson, Model, complaints, console, empty_folder, print_json
from hscr.config import LoopConfig
from hscr.recipes import recipes as all_recipes
from hscr.stack import PHANTOM

_SETTING = Setting()

Suites = Annotated[list[SuiteName], typer.Option("--suite", help="Which table; repeat it for several.")]
Seeds = Annotated[int, typer.Option(min=1, help="Each draws data, masks, first weights and order anew.")]
Out = Annotated[Path, typer.Option(help="Folder; suites that share it share the arms they have in common.")]
Images = Annotated[int, typer.Option(min=1, help="Held-out images, about 8 questions each.")]
Records = Annotated[int, typer.Option(min=1, help="Questions with right answers to start from, per seed.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps of every arm.")]
Split = Annotated[Literal["development", "test"], typer.Option(help="Of the held-out images.")]
Mix = Annotated[
    Literal["training", "traffic", "balanced"],
    typer.Option(
        help="Facts in the training images: as the model learnt them, as a hospital sends them, even."
    ),
]
Config = Annotated[
    Path | None, typer.Option(help="A TOML file or a recipe: what the arms change one thing of.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Arms at once, each in a process of one thread.")]
Resume = Annotated[bool, typer.Option("--resume", help="Use what the folder holds and run the rest.")]


def ablate(
    *,
    suite: Suites,
    seeds: Seeds = 3,
    out: Out = Path("ablation"),
    images: Images = 100,
    records: Records = _SETTING.records,
    steps: Steps = _SETTING.steps,
    mix: Mix = _SETTING.mix,
    split: Split = "development",
    config: Config = None,
    model: Model = PHANTOM,
    jobs: Jobs = 1,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Repeat the paper's ablations (Tables 3 to 6) on phantoms, and say which of its orderings hold.

    A suite is a table of the paper:

        mask      Table 5: what is dropped: pixels, patches, attention, or visual tokens
        source    Table 3: who writes the dispreferred answers: the model, somebody else, or chance
        levels    Table 4: explicit preferences, implicit ones, or both; and plain fine-tuning
        rate      Table 6: how much is dropped: 30, 50, 70 or 90 %

    Every arm starts from the same questions and trains for as many steps. An arm takes a minute or two on
    one CPU core: a suite with 3 seeds some 15 minutes, all four three quarters of an hour, because they share
    the arm of the method itself. A killed run loses one arm.

    Examples:

        hscr ablate --suite mask --seeds 3
        hscr ablate --suite mask --suite rate --seeds 3 --out ablation --resume
        hscr ablate --suite levels --seeds 1 --images 20 --records 100 --steps 10       a try, in 2 minutes
        hscr ablate --suite source --mix traffic --split test --jobs 2 --out elsewhere

    Written are ablation/mask/table.md, plot.png and results.json, with every configuration and digest.
    """
    if not resume:
        empty_folder(out)
    loop = LoopConfig() if config is None else LoopConfig.from_toml(config)
    asked = loop.evaluate.model_copy(update={"images": images, "split": split})
    shared = loop.model_copy(update={"evaluate": asked})
    setting = Setting(records=records, steps=steps, mix=mix, loop=shared)
    from hscr.ablate.report import rendered
    from hscr.ablate.run import ablate as run  # torch

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=complaints) as bars:
        task = bars.add_task("arms", total=None)
        try:
            found = run(
                model, list(dict.fromkeys(suite)), setting, seeds, out, jobs=jobs,
                on_progress=lambda done, total, what: bars.update(
                    task, completed=done, total=total, description=what
                ),
            )  # fmt: skip
        except KeyboardInterrupt:
            complaints.print(f"Stopped; --resume goes on in {out}.", markup=False)
            raise
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
        return
    for each in found:
        console.print(rendered(each))
        console.print(f"{out / each.suite}: table.md, plot.png, results.json", markup=False)


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one, resolved.", show_default=False)] = None,
) -> None:
    """List the configurations that come with this package, or print one with every value it stands for.

    A recipe's name is taken wherever --config is; a file of your own can begin with `extends = "NAME"`.

    Examples:

        hscr recipes
        hscr recipes hscr-llava-med
        hscr generate --config hscr-plausible --input rows.jsonl --out records
    """
    if name is not None:
        print_json(LoopConfig.from_toml(Path(name)).resolved())
        return
    table = Table("recipe", "what it is")
    for recipe in all_recipes():
        table.add_row(recipe.name, recipe.about)
    console.print(table)
