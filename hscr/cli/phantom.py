"""`hscr phantom`: the embedded model and its synthetic images."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from hscr.cli.common import Model, console, empty_folder
from hscr.stack import PHANTOM

phantom = typer.Typer(no_args_is_help=True, help="The embedded model: make, measure, sample its images.")


@phantom.command()
def train(
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = PHANTOM,
    *,
    seed: int = 0,
    scale: Annotated[float, typer.Option(min=0.0001, help="Multiplies the number of steps.")] = 1.0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Train the embedded model from nothing: at most 20 CPU-minutes, the same seed the same model.

    Example:

        hscr phantom train --out /tmp/phantom --scale 0.01
    """
    from hscr.models.phantom.train import main  # torch

    seconds = main(out, seed=seed, scale=scale, threads=threads)
    console.print(f"{out}: " + ", ".join(f"{stage} {value:.0f} CPU-s" for stage, value in seconds.items()))


@phantom.command()
def probe(
    model: Model = PHANTOM,
    *,
    split: Annotated[Literal["development", "test"], typer.Option()] = "development",
    images: Annotated[int, typer.Option(min=1, help="Phantoms to ask about.")] = 200,
    drop_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of visual tokens dropped.")] = 0.7,
) -> None:
    """Measure how well a phantom model answers with the whole image, with little of it, and with none.

    Example:

        hscr phantom probe --images 50
    """
    from hscr.models.phantom.probe import evaluate, show  # torch

    show(evaluate(model, split=split, images=images, drop_rate=drop_rate), console)


@phantom.command()
def sample(
    out: Annotated[Path, typer.Option(help="A new folder.")] = Path("samples"),
    *,
    images: Annotated[int, typer.Option(min=1)] = 12,
    questions: Annotated[int, typer.Option(min=1, help="About each image.")] = 3,
    seed: int = 0,
) -> None:
    """Draw phantom images, with questions and right answers in rows.jsonl.

    They are of the traffic's seeds, which no model was trained or tested on. The rows are what
    `hscr generate --input` takes.

    Examples:

        hscr phantom sample
        hscr ask samples/00.png "Is there a nodule?"
        hscr generate --input samples/rows.jsonl --images samples --out records
    """
    from hscr.models.phantom.anatomy import render
    from hscr.models.phantom.data import BALANCED, sample_examples

    empty_folder(out)
    drawn: dict[int, str] = {}
    with (out / "rows.jsonl").open("w", encoding="utf-8") as rows:
        for example in sample_examples(BALANCED, "traffic", images, seed, questions):
            name = drawn.setdefault(example.phantom.seed, f"{len(drawn):02d}.png")
            if not (out / name).exists():
                render(example.phantom).save(out / name)
            row = {"image": name, "question": example.question, "answer": example.answer}
            rows.write(json.dumps({"id": example.id, **row, "study": Path(name).stem}) + "\n")
    console.print(f"{len(drawn)} images and {out / 'rows.jsonl'}")
