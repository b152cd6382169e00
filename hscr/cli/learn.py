"""`hscr generate`, `finetune`, `evaluate`, `export`: the loop's steps, on the stack or on files alone."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hscr.cli import here
from hscr.cli.common import HOME, URL, AsJson, Home, Key, Model, Url
from hscr.cli.follow import report
from hscr.client import Client, Upload, finetune_body
from hscr.config import LoopConfig
from hscr.errors import InvalidInput, InvalidRecord
from hscr.rows.row import Row, Unusable
from hscr.rows.source import RowSource, open_rows
from hscr.stack import PHANTOM
from hscr.store.export.form import Form

Config = Annotated[
    Path | None,
    typer.Option(help="TOML with sections generate, finetune, evaluate; unknown keys are errors."),
]
Wait = Annotated[bool, typer.Option("--wait", help="Follow it, and the jobs it starts, to the end.")]
Method = Annotated[Literal["hscr", "random"], typer.Option(help="Which records: the method, or its control.")]
Promote = Annotated[bool, typer.Option("--auto-promote", help="Release it if the gate passes.")]
Rows = Annotated[
    str | None,
    typer.Option("--input", help="A folder, a JSONL or Parquet file, or `vqa-rad:PATH`.", metavar="ROWS"),
]
Images = Annotated[Path | None, typer.Option(help="Where image paths start. Default: where the rows are.")]
RecordsOut = Annotated[Path | None, typer.Option(help="Folder for the records; no stack is used.")]
Resume = Annotated[bool, typer.Option("--resume", help="With --out: go on with the run in that folder.")]
Limit = Annotated[int | None, typer.Option(min=1, help="With --out: the first so many rows only.")]
ShardSize = Annotated[int, typer.Option(min=1, help="With --out: rows per shard, which a kill can cost.")]
BatchSize = Annotated[int, typer.Option(min=1, help="With --out: rows generated together.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Of work done here: auto is CUDA if there is one.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Of work done here: auto is bfloat16 on CUDA and float32 elsewhere."),
]
Compiled = Annotated[
    bool,
    typer.Option(
        "--compile", help="With --out and mode decoded: steps by torch.compile, CUDA graphs on a GPU."
    ),
]
AnswerWith = Annotated[Path | None, typer.Option(help="With --out: an adapter folder to answer with.")]
Consent = Annotated[bool, typer.Option("--consent", help="The rows may be trained on.")]
Then = Annotated[bool, typer.Option("--then-finetune", help="Train and judge afterwards.")]
RecordsIn = Annotated[
    Path | None,
    typer.Option(help="Folder of `hscr generate --out` or of an export, or its .parquet or .jsonl file."),
]
AdapterOut = Annotated[Path | None, typer.Option(help="With --records: new folder for the adapter.")]
CheckpointEvery = Annotated[int, typer.Option(min=0, help="With --records: steps; 0 writes none.")]
ResumeTraining = Annotated[bool, typer.Option("--resume", help="With --records: from its last checkpoint.")]
ReportTo = Annotated[
    Literal["tensorboard", "mlflow"] | None,
    typer.Option(help="With --records: send the metrics there, TensorBoard's to OUT.runs."),
]
Quantize = Annotated[
    Literal["nf4"] | None, typer.Option(help="With --records: hold the base model in four bits (QLoRA).")
]
CacheDir = Annotated[Path | None, typer.Option(help="With --records: keep the reference's log-probs there.")]
Judge = Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Judge the result.")]
Version = Annotated[str | None, typer.Argument(help="To be judged on the stack.", show_default=False)]
AdapterFolder = Annotated[Path | None, typer.Option(help="To be judged here, without a stack.")]
ExportOut = Annotated[Path, typer.Option(help="A new folder.", show_default=False)]
Format = Annotated[Form, typer.Option("--format", help="Who shall read it.")]

_HERE = "resume", "limit", "shard_size", "batch_size", "device", "dtype", "compiled", "model", "adapter"
_ON_THE_STACK = "consent", "then_finetune", "auto_promote", "wait", "url", "key"


def generate(
    context: typer.Context,
    *,
    rows: Rows = None,
    images: Images = None,
    out: RecordsOut = None,
    resume: Resume = False,
    limit: Limit = None,
    shard_size: ShardSize = 256,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    compiled: Compiled = False,
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

    Rows are an image, a question and its right answer, one of:

        rows.jsonl      {"image": path, "question": text, "answer": text, "id": ..., "study": ...}
        data.parquet    the same columns; the image as a path, as bytes, or as `datasets` stores it
        folder          with rows.jsonl, metadata.jsonl (file_name) or *.parquet; or scan.json beside scan.png
        vqa-rad:PATH    the public release of VQA-RAD; its test questions are left out

    Examples:

        hscr generate --wait                            all pending feedback, on the stack
        hscr generate --input rows.jsonl --consent --then-finetune --wait
        hscr generate --input vqa-rad:data/vqa_rad --out records --limit 200      here, without a stack
        hscr generate --input vqa-rad:data/vqa_rad --out records --limit 200 --resume
        hscr finetune --records records --out adapter

    With --out, rows that give no record are named in records/skipped.jsonl and never stop a run; a killed run
    goes on with --resume and ends as if it had never been killed; records/summary.html shows what was made.
    """
    loop = _loop(config)
    if out is not None:
        _refuse(context, _ON_THE_STACK, "cannot go with --out", "Leave --out away to use the stack.")
        if rows is None:
            raise InvalidInput("--out needs --input.", remedy="Name the rows to start from.")
        options = {"resume": resume, "limit": limit, "shard_size": shard_size, "batch_size": batch_size}
        where = {"device": device, "dtype": dtype, "compiled": compiled}
        folders = here.Folders(model, images, out, adapter)
        here.generate(rows, folders, loop, {**options, **where}, as_json=as_json)
        return
    _refuse(context, _HERE, "cannot go without --out", "Name the run's folder by --out.")
    following = finetune_body(loop.finetune, evaluate=loop.evaluate, auto_promote=auto_promote)
    with Client(url, key) as client:
        job = client.generate(
            loop.generate,
            rows=None if rows is None else _uploads(open_rows(rows, images)),
            consent=consent,
            then=following if then_finetune else None,
        )
        report(client, job, wait=wait, as_json=as_json)


def finetune(
    *,
    records: RecordsIn = None,
    out: AdapterOut = None,
    model: Model = PHANTOM,
    checkpoint_every: CheckpointEvery = 0,
    resume: ResumeTraining = False,
    report_to: ReportTo = None,
    cache_dir: CacheDir = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
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

        hscr finetune --wait                                              on the stack
        hscr finetune --records records --out adapter                     here, without one
        hscr finetune --records records --out adapter --checkpoint-every 50 --report-to tensorboard
        hscr finetune --records records --out adapter --checkpoint-every 50 --resume
        accelerate launch .venv/bin/hscr finetune --records records --out adapter

    A resumed run ends with the very adapter of one that was never killed. Under accelerate launch, DDP, FSDP
    and DeepSpeed are accelerate's own configuration.
    """
    loop = _loop(config)
    if (records is None) != (out is None):
        raise InvalidInput("--records and --out belong together.", remedy="Give both, or neither.")
    if records is not None and out is not None:
        options = {
            "checkpoint_every": checkpoint_every,
            "resume": resume,
            "report_to": [report_to] if report_to else [],
            "cache_dir": cache_dir,
            "device": device,
            "dtype": dtype,
            "quantize": quantize,
        }
        here.finetune(model, records, out, loop, options, as_json=as_json)
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
    device: Device = "auto",
    dtype: Dtype = "auto",
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
        here.evaluate(model, adapter, loop, {"device": device, "dtype": dtype}, as_json=as_json)
        return
    with Client(url, key) as client:
        job = client.evaluate(str(version), loop.evaluate, auto_promote=auto_promote)
        report(client, job, wait=wait, as_json=as_json)


def export(
    out: ExportOut,
    *,
    form: Format = Form.JSONL,
    method: Method = "hscr",
    records: RecordsIn = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Write preference records, with their images and a data set card, for this or another trainer.

    `jsonl` and `parquet` keep everything and are read back by `hscr finetune`. The others have one row per
    dispreferred answer:

        trl             Parquet that `datasets` loads and TRL's DPOTrainer trains on
        llamafactory    JSONL and dataset_info.json for `stage: dpo`
        ms-swift        JSONL for `swift rlhf --rlhf_type dpo`
        rlaif-v         Parquet in the columns of RLAIF-V

    Examples:

        hscr export --out pairs --format trl                        the stack's live consented records
        hscr export --records records --out pairs --format trl      those of `hscr generate --out records`
    """
    if records is not None:
        here.export(records, out, form, as_json=as_json)
    else:
        here.export_live(home, method, out, form, as_json=as_json)


def _loop(path: Path | None) -> LoopConfig:
    return LoopConfig() if path is None else LoopConfig.from_toml(path)


def _refuse(context: typer.Context, names: tuple[str, ...], why: str, remedy: str) -> None:
    """Raises InvalidInput for those of the options that stand on the command line."""
    options = [option for option in context.command.params if option.name in names]
    # Whoever has HSCR_URL or HSCR_MODEL_PATH set did not ask for them here.
    given = [option.opts[0] for option in options if _source(context, option.name) == "COMMANDLINE"]
    if given:
        raise InvalidInput(f"{', '.join(given)} {why}.", remedy=remedy)


def _source(context: typer.Context, option: str | None) -> str:
    source = context.get_parameter_source(option or "")
    return source.name if source else ""


def _uploads(rows: RowSource) -> list[Upload]:
    return [_upload(row) for row in rows.read()]


def _upload(row: Row | Unusable) -> Upload:
    """A job is submitted whole or not at all. Raises InvalidRecord that names the row."""
    if isinstance(row, Unusable):
        raise InvalidRecord(
            f"{row.place} cannot be used: {row.reason}",
            remedy="Correct or remove it; `--out` skips such rows.",
        )
    try:
        image = row.image if isinstance(row.image, bytes) else row.image.read_bytes()
    except OSError as error:
        raise InvalidRecord(
            f"The image {row.image!s} of {row.place} cannot be read: {error.strerror}.",
            remedy="Check the row's path and --images.",
        ) from error
    return Upload(image, row.question, row.answer, row.study)
