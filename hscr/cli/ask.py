"""`hscr ask` and `hscr caption`: one image, one answer."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from hscr.cli.common import URL, AsJson, Key, Model, Url, console, print_json, read_bytes
from hscr.client import Client
from hscr.errors import InvalidInput
from hscr.records import Answer, Job, VisualDependence
from hscr.stack import PHANTOM

ImageFile = Annotated[Path, typer.Argument(help="PNG, JPEG or DICOM file.", show_default=False)]
Adapter = Annotated[
    str | None,
    typer.Option(help="A version or `base`; with --local an adapter folder. Default: what serves."),
]
Study = Annotated[str | None, typer.Option(help="Pseudonym that groups what belongs to one examination.")]
Frame = Annotated[int | None, typer.Option(min=0, help="Of a multi-frame DICOM file, from 0.")]
Window = Annotated[str | None, typer.Option(help="CT window by name. Default: as the file says.")]


def ask(
    image: ImageFile,
    question: Annotated[str, typer.Argument(show_default=False)],
    *,
    adapter: Adapter = None,
    study: Study = None,
    frame: Frame = None,
    window: Window = None,
    local: Annotated[bool, typer.Option("--local", help="Load the model here; no stack is needed.")] = False,
    model: Model = PHANTOM,
    url: Url = URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Ask a question about one image. For research use only.

    Examples:

        hscr ask xray.png "Is there a nodule?"
        hscr ask ct.dcm "On which side is the lesion?" --window lung --adapter base
        hscr ask xray.png "Is there a nodule?" --local
    """
    data = read_bytes(image)
    if local:
        _ask_here(data, question, adapter, model, frame=frame, window=window, study=study, as_json=as_json)
        return
    with Client(url, key) as client:
        options = {"adapter": adapter, "study": study, "frame": frame, "window": window}
        _show(client.ask(data, question, **options), as_json=as_json)


def caption(
    image: ImageFile,
    *,
    prompt: Annotated[str | None, typer.Option(help="Default: the model's own caption prompt.")] = None,
    adapter: Adapter = None,
    study: Study = None,
    frame: Frame = None,
    window: Window = None,
    url: Url = URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Describe one image. For research use only.

    Example:

        hscr caption xray.png
    """
    with Client(url, key) as client:
        options = {"prompt": prompt, "adapter": adapter, "study": study, "frame": frame, "window": window}
        _show(client.caption(read_bytes(image), **options), as_json=as_json)


def dependence(
    answer: Annotated[
        str, typer.Argument(metavar="ANSWER", help="Id, as `hscr ask` prints it.", show_default=False)
    ],
    *,
    url: Url = URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """How much the image changed each word of an answer, in nats. It is no explanation.

    The version that answered says how probable each word is with the image, and with 70 % of its visual
    tokens dropped. For research use only.

    Example:

        hscr dependence ans_3f9c2a7b1d4e
    """
    with Client(url, key) as client:
        found = client.score_answer(answer)
        if isinstance(found, Job):
            client.wait(found.id)
            found = client.visual_dependence(answer)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _show_dependence(found)


def _ask_here(
    data: bytes,
    question: str,
    adapter: str | None,
    model: Path,
    *,
    frame: int | None,
    window: str | None,
    study: str | None,
    as_json: bool,
) -> None:
    if study is not None:
        raise InvalidInput("--local keeps no answer, so it has no study.", remedy="Leave --study out.")
    from hscr import local  # torch

    folder = Path(adapter) if adapter not in {None, "base"} else None
    text = local.ask(model, data, question, adapter=folder, frame=frame, window=window)
    if as_json:
        print_json({"text": text, "model": str(model), "adapter": adapter})
    else:
        console.print(Text(text, style="bold"))


def _show(answer: Answer, *, as_json: bool) -> None:
    if as_json:
        print_json(answer.model_dump(mode="json"))
        return
    made = answer.provenance
    console.print(Text(answer.text, style="bold"))
    story = f"{made.model} {made.adapter or '(base)'} · {made.recipe.name} · {answer.id} · research use only"
    console.print(Text(story, style="dim"))


def _show_dependence(found: VisualDependence) -> None:
    table = Table("token", caption="log-probabilities in nats; dimmed tokens do not count")
    for column in ("with the image", "without most of it", "difference"):
        table.add_column(column, justify="right")
    for token in found.tokens:
        values = (f"{token.full:.3f}", f"{token.dropped:.3f}", f"{token.difference:+.3f}")
        table.add_row(Text(token.text), *values, style=None if token.content else "dim")
    console.print(table)
    console.print(f"visual dependence [bold]{found.score:+.3f}[/] nats per content token")
    how = found.dropping
    story = (
        f"{found.adapter or '(base)'} · {how.rate:.0%} of visual tokens dropped ({how.mode}), "
        f"{how.masks} masks · how much the image changed a word, no explanation · research use only"
    )
    console.print(Text(story, style="dim"))
