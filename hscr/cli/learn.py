"""`hscr generate`, `finetune`, `evaluate`, `export`: the loop's steps, on the stack or on files alone."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hscr.cli import here
from hscr.cli.common import HOME, URL, AsJson, Home, Key, Model, Url, open_store, read_bytes
from hscr.cli.follow import report
from hscr.client import Client, Upload, finetune_body
from hscr.config import LoopConfig
from hscr.errors import InvalidInput
from hscr.rows import read_rows, row_image
from hscr.stack import PHANTOM
from hscr.store.export import FORMS, image_path, read_records
from hscr.store.export import export as write_export

Config = Annotated[
    Path | None,
    typer.Option(help="TOML with sections generate, finetune, evaluate; unknown keys are errors."),
]
Wait = Annotated[bool, typer.Option("--wait", help="Follow it, and the jobs it starts, to the end.")]
Method = Annotated[Literal["hscr", "random"], typer.Option(help="Which records: the method, or its control.")]
Promote = Annotated[bool, typer.Option("--auto-promote", help="Release it if the gate passes.")]
Rows = Annotated[Path | None, typer.Option("--input", help="JSONL: image, question, answer, id, study.")]
Images = Annotated[Path | None, typer.Option(help="Where the rows' images are. Default: beside the rows.")]
RecordsOut = Annotated[Path | None, typer.Option(help="New folder for the records; no stack is used.")]
AnswerWith = Annotated[Path | None, typer.Option(help="With --out: an adapter folder to answer with.")]
Consent = Annotated[bool, typer.Option("--consent", help="The rows may be trained on.")]
Then = Annotated[bool, typer.Option("--then-finetune", help="Train and judge afterwards.")]
RecordsFile = Annotated[Path | None, typer.Option(help="A records.jsonl with images/ beside it.")]
AdapterOut = Annotated[Path | None, typer.Option(help="With --records: new folder for the adapter.")]
Judge = Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Judge the result.")]
Version = Annotated[str | None, typer.Argument(help="To be judged on the stack.", show_default=False)]
AdapterFolder = Annotated[Path | None, typer.Option(help="To be judged here, without a stack.")]
ExportOut = Annotated[Path, typer.Option(help="A new folder.", show_default=False)]
Format = Annotated[str, typer.Option("--format", help=f"One of: {', '.join(FORMS)}.")]


def generate(
    *,
    rows: Rows = None,
    images: Images = None,
    out: RecordsOut = None,
    model: Model = PHANTOM,
    adapter: AnswerWith = None,
    consent: Consent = False,
    then_finetune: Then = False,
    auto_promote: Promote = False,
    config: Config = None,
    wait: Wait = False,
    url: Url = URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make dispreferred answers: from reviewers' feedback, from rows, or from files alone.

    Examples:

        hscr generate --wait                            all pending feedback, on the stack
        hscr generate --input rows.jsonl --consent --then-finetune --wait
        hscr generate --input rows.jsonl --out records  here, without a stack
    """
    loop = _loop(config)
    if out is not None:
        if rows is None:
            raise InvalidInput("--out needs --input.", remedy="Name the rows to start from.")
        folders = here.Folders(model, images or rows.parent, out, adapter)
        here.generate(rows, folders, loop, as_json=as_json)
        return
    following = finetune_body(loop.finetune, evaluate=loop.evaluate, auto_promote=auto_promote)
    with Client(url, key) as client:
        job = client.generate(
            loop.generate,
            rows=None if rows is None else _uploads(rows, images or rows.parent),
            consent=consent,
            then=following if then_finetune else None,
        )
        report(client, job, wait=wait, as_json=as_json)


def finetune(
    *,
    records: RecordsFile = None,
    out: AdapterOut = None,
    model: Model = PHANTOM,
    method: Method = "hscr",
    judge: Judge = True,
    auto_promote: Promote = False,
    config: Config = None,
    wait: Wait = False,
    url: Url = URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA adapter from the base model on all live consented records, or on a file of them.

    Examples:

        hscr finetune --wait
        hscr finetune --records records/records.jsonl --out adapter
    """
    loop = _loop(config)
    if (records is None) != (out is None):
        raise InvalidInput("--records and --out belong together.", remedy="Give both, or neither.")
    if records is not None and out is not None:
        here.finetune(model, records, out, loop, as_json=as_json)
        return
    evaluate_with = loop.evaluate if judge else None
    with Client(url, key) as client:
        job = client.finetune(loop.finetune, method=method, evaluate=evaluate_with, auto_promote=auto_promote)
        report(client, job, wait=wait, as_json=as_json)


def evaluate(
    version: Version = None,
    *,
    adapter: AdapterFolder = None,
    model: Model = PHANTOM,
    auto_promote: Promote = False,
    config: Config = None,
    wait: Wait = False,
    url: Url = URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Judge a version against the active one through the engine, or an adapter folder against its base here.

    Examples:

        hscr evaluate hscr@3f9c2a7b1d4e --wait
        hscr evaluate --adapter adapter
    """
    loop = _loop(config)
    if (version is None) == (adapter is None):
        raise InvalidInput(
            "It is not clear what to judge.", remedy="Name a version of the stack, or a folder by --adapter."
        )
    if adapter is not None:
        here.evaluate(model, adapter, loop, as_json=as_json)
        return
    with Client(url, key) as client:
        job = client.evaluate(str(version), loop.evaluate, auto_promote=auto_promote)
        report(client, job, wait=wait, as_json=as_json)


def export(
    out: ExportOut,
    *,
    form: Format = "jsonl",
    method: Method = "hscr",
    records: RecordsFile = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Write the live consented preference records, with their images, for other trainers.

    Examples:

        hscr export --out pairs --format trl
        hscr export --records records/records.jsonl --out pairs --format trl
    """
    if records is not None:
        folder = records.parent
        done = write_export(
            read_records(records), lambda digest: read_bytes(folder / image_path(digest)), out, form
        )
    else:
        with open_store(home) as store:
            live = store.preferences.live(method=method, limit=1_000_000)
            done = write_export(live, store.blobs.get, out, form)
    here.show_export(done, as_json=as_json)


def _loop(path: Path | None) -> LoopConfig:
    return LoopConfig() if path is None else LoopConfig.from_toml(path)


def _uploads(path: Path, images: Path) -> list[Upload]:
    return [Upload(row_image(images, row), row.question, row.answer, row.study) for row in read_rows(path)]
