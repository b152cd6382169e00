"""The loop's science on this machine without any service: files in, files out. Imports torch."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, Unpack

from hscr.answers import answer, greedy, open_png
from hscr.config import EvaluateConfig, FinetuneConfig
from hscr.errors import Conflict
from hscr.evaluate.gate import Judgement, Measured, judge
from hscr.evaluate.metrics import DEPENDENCE, score, summarise
from hscr.evaluate.run import require_askable, require_readable
from hscr.evaluate.suites import Suite, load_suite
from hscr.imaging.decode import prepare
from hscr.imaging.guard import Limits
from hscr.learn.examples import Pair
from hscr.learn.trainer import FinetuneResult, checkpoints_beside, finetune
from hscr.models.vlm import VLM
from hscr.runs.model import attached, load
from hscr.store.export.read import read_records

BASE, CANDIDATE = "base", "candidate"

Progress = Callable[[int, int], None]


class FinetuneOptions(TypedDict, total=False):
    """What `hscr.learn.trainer.finetune` takes besides records and configuration."""

    on_progress: Callable[[int, int, dict[str, float]], None]
    checkpoint_every: int
    resume: bool
    on_resumed: Callable[[int], None]
    report_to: Sequence[Literal["tensorboard", "mlflow"]]
    cache_dir: Path | None


class Compared(NamedTuple):
    """The base model and the adapter on one suite: scores per version, and what the gate says."""

    suite: Suite
    scores: dict[str, dict[str, float]]
    judgement: Judgement


def ask(
    model: Path,
    image: bytes,
    question: str,
    *,
    adapter: Path | None = None,
    frame: int | None = None,
    window: str | None = None,
) -> str:
    """One greedy answer about PNG, JPEG or DICOM bytes."""
    vlm = VLM.load(model)
    picture = open_png(prepare(image, limits=Limits(), frame=frame, window=window).png)
    with attached(vlm, adapter, CANDIDATE) as name:
        return greedy(vlm, [(question, "image")], {"image": picture}, name)[0]


def finetune_records(
    model: Path,
    records: Path,
    folder: Path,
    config: FinetuneConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Literal["nf4"] | None = None,
    **options: Unpack[FinetuneOptions],
) -> FinetuneResult:
    """Train an adapter on records, as a run's folder, Parquet or JSONL, and write it to the new `folder`.

    `options` are those of `hscr.learn.trainer.finetune`, which says what else is raised.
    Raises InvalidRecord, NotFound; Conflict before any work when the folder holds something, or another run's
    checkpoint lies beside it that `resume` does not ask for.
    """
    _take(folder, resume=options.get("resume", False))
    pictures: dict[str, bytes] = {}
    examples: list[Pair] = []
    for record, png, _ in read_records(records):
        # Decoded when a step needs it: pixels take many times the memory of a PNG.
        examples.append((record, partial(open_png, pictures.setdefault(record.image_digest, png))))
    vlm = load(model, device, dtype, quantize=quantize)
    return finetune(vlm, examples, config, out_dir=folder, **options)


def _take(folder: Path, *, resume: bool) -> None:
    """Make the folder of an adapter to be trained. Raises Conflict rather than replace anything."""
    checkpoints = checkpoints_beside(folder)
    if resume and (folder / "adapter_config.json").is_file():
        raise Conflict(
            f"{folder} holds an adapter: that run has ended.",
            remedy="Nothing is left to resume. Name a new folder with --out for another run.",
        )
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Conflict(f"{folder} is no empty folder.", remedy="Name a new folder with --out.")
    if not resume and any(checkpoints.glob("checkpoint-*")):
        raise Conflict(
            f"{checkpoints} is what an interrupted run left.",
            remedy="Go on with that run by --resume, or remove the folder to begin anew.",
        )
    folder.mkdir(parents=True, exist_ok=True)


def evaluate_adapter(
    model: Path,
    adapter: Path,
    config: EvaluateConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    on_progress: Progress = lambda _done, _total: None,
) -> Compared:
    """Judge an adapter against its base model by the gate's rules, answering with transformers directly.

    The stack judges through the engine that serves; this needs none. Raises what `load_suite` does,
    InvalidInput for a suite that asks nothing or twice under one id, InvalidQuestion for a question that the
    model cannot be asked, all before anything is answered, and NotFound.
    """
    suite = load_suite(config)
    require_askable(suite)
    vlm = load(model, device, dtype)
    require_readable(suite, vlm)
    measured: dict[str, Measured] = {}
    with attached(vlm, adapter, CANDIDATE) as name:
        for number, (label, version) in enumerate({BASE: None, CANDIDATE: name}.items()):
            done = number * len(suite.items)
            answered = answer(vlm, version, suite, config, _offset(on_progress, done, 2 * len(suite.items)))
            outcomes = [score(item, answered.answers[item.id]) for item in suite.items]
            measured[label] = Measured(outcomes, answered.dependence)
    judgement = judge(measured[CANDIDATE], measured[BASE], config.gate, seed=config.seed)
    return Compared(suite, {label: _scores(result) for label, result in measured.items()}, judgement)


def _offset(on_progress: Progress, before: int, total: int) -> Callable[[int], None]:
    return lambda done: on_progress(before + done, total)


def _scores(measured: Measured) -> dict[str, float]:
    values = measured.dependence.values()
    return {**summarise(measured.outcomes), DEPENDENCE: sum(values) / len(values)}
