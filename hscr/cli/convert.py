"""`hscr convert`: a LLaVA checkpoint as its authors saved it, for everything else here."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hscr.cli.common import AsJson, complaints, console, print_json
from hscr.errors import InvalidInput

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of the original checkpoint.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option(help="A new folder.", show_default=False)],
    vision_tower: Annotated[
        Path | None, typer.Option(help="Folder of the CLIP model, where the checkpoint holds none.")
    ] = None,
    replace_vision_tower: Annotated[
        bool, typer.Option(help="Take that folder's weights even where the checkpoint has its own.")
    ] = False,
    template: Annotated[
        Literal["auto", "llava_med", "vicuna"], typer.Option(help="How questions are put to the model.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as stored.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Such as 4GB; bounds the memory of writing.")] = "4GB",
    vocabulary_multiple: Annotated[int, typer.Option(min=1, help="Round the vocabulary up to this.")] = 1,
    device: Annotated[str, typer.Option(help="Where the result is loaded for its checks.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Convert an original LLaVA or LLaVA-Med checkpoint, and prove that the result is the same model.

    Examples:

        hscr convert llava-med-v1.5-mistral-7b --out llava-med-hf
        hscr convert llava-v1.5-7b --out llava-hf --vision-tower clip-vit-large-patch14-336

    Nothing appears under the new folder's name before every check has passed; a conversion that was cut off
    goes on where it was.
    """
    limit = _bytes(max_shard_size)
    from hscr.models.convert.convert import Options, convert  # torch

    options = Options(
        vision_tower=vision_tower,
        replace_vision_tower=replace_vision_tower,
        template=template,
        dtype=dtype,
        max_shard_bytes=limit,
        vocabulary_multiple=vocabulary_multiple,
        device=device,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=complaints) as bars:
        tasks = {stage: bars.add_task(stage, total=None) for stage in ("write", "verify")}

        def advance(stage: str, now: int, total: int) -> None:
            bars.update(tasks[stage], completed=now, total=total)

        done = convert(source, out, options, advance)
    if as_json:
        print_json(done._asdict() | {"canary": done.canary._asdict()})
        return
    table = Table("check", "result", title=f"{done.path}: {done.parameters:,} parameters, {done.dtype}")
    table.add_row("tensors equal to their source", f"{done.tensors} in {done.shards} file(s)")
    for layer, digest in done.vision.items():
        table.add_row(f"{layer}, SHA-256", digest[:16])
    table.add_row("text-only logits, largest difference", f"{done.logits_difference:.2g}")
    table.add_row(f"prompts as in the original code ({done.template})", str(done.prompts))
    table.add_row("canary: an answer's change by noise, nats per token", f"{done.canary.change:.3g}")
    table.add_row("its answer to a drawn chest radiograph", done.canary.answer)
    console.print(table, markup=False)


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B)", size.strip().upper())
    limit = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if limit == 0:
        raise InvalidInput(f"{size!r} is no size.", remedy="Write --max-shard-size as 4GB or 500MB.")
    return limit
