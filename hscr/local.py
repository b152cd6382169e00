"""The loop's science on this machine without any service: files in, files out. Imports torch."""

import io
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from PIL import Image

from hscr.config import EvaluateConfig, FinetuneConfig
from hscr.contrast.dependence import Said, visual_dependence
from hscr.evaluate.gate import Judgement, Measured, judge
from hscr.evaluate.metrics import DEPENDENCE, Outcome, score, summarise
from hscr.evaluate.suites import Suite, load_suite
from hscr.imaging.decode import prepare
from hscr.imaging.guard import Limits
from hscr.learn.examples import Pair
from hscr.learn.trainer import FinetuneResult, finetune
from hscr.models.vlm import VLM
from hscr.runs.model import attached, load
from hscr.store.export.read import read_records

BASE, CANDIDATE = "base", "candidate"
_BATCH = 32

Progress = Callable[[int, int], None]


class FinetuneOptions(TypedDict, total=False):
    """What `hscr.learn.trainer.finetune` takes besides records and configuration."""

    on_progress: Callable[[int, int, dict[str, float]], None]
    checkpoint_every: int
    resume: bool
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
    picture = _open(prepare(image, limits=Limits(), frame=frame, window=window).png)
    with attached(vlm, adapter, CANDIDATE) as name:
        return _greedy(vlm, [(question, "image")], {"image": picture}, name)[0]


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
    """Train an adapter on records, as a run's folder, Parquet or JSONL, and write it to `folder`.

    `options` are those of `hscr.learn.trainer.finetune`, which says what else is raised.
    Raises InvalidRecord, NotFound.
    """
    pictures: dict[str, bytes] = {}
    examples: list[Pair] = []
    for record, png, _ in read_records(records):
        # Decoded when a step needs it: pixels take many times the memory of a PNG.
        examples.append((record, partial(_open, pictures.setdefault(record.image_digest, png))))
    vlm = load(model, device, dtype, quantize=quantize)
    return finetune(vlm, examples, config, out_dir=folder, **options)


def evaluate_adapter(
    model: Path,
    adapter: Path,
    config: EvaluateConfig,
    *,
    on_progress: Progress = lambda _done, _total: None,
) -> Compared:
    """Judge an adapter against its base model by the gate's rules, answering with transformers directly.

    The stack judges through the engine that serves; this needs none.
    """
    suite = load_suite(config)
    vlm = VLM.load(model)
    measured: dict[str, Measured] = {}
    with attached(vlm, adapter, CANDIDATE) as name:
        for number, (label, version) in enumerate({BASE: None, CANDIDATE: name}.items()):
            done = number * len(suite.items)
            outcomes = _answer_all(vlm, suite, version, _offset(on_progress, done, 2 * len(suite.items)))
            measured[label] = Measured(outcomes, _dependence(vlm, suite, version, config))
    judgement = judge(measured[CANDIDATE], measured[BASE], config.gate, seed=config.seed)
    return Compared(suite, {label: _scores(result) for label, result in measured.items()}, judgement)


def _offset(on_progress: Progress, before: int, total: int) -> Callable[[int], None]:
    return lambda done: on_progress(before + done, total)


def _answer_all(
    vlm: VLM, suite: Suite, adapter: str | None, on_progress: Callable[[int], None]
) -> list[Outcome]:
    texts: list[str] = []
    for start in range(0, len(suite.items), _BATCH):
        batch = suite.items[start : start + _BATCH]
        pictures = {item.image_digest: _open(item.image_png) for item in batch}
        texts += _greedy(vlm, [(item.question, item.image_digest) for item in batch], pictures, adapter)
        on_progress(len(texts))
    return [score(item, text) for item, text in zip(suite.items, texts, strict=True)]


def _greedy(
    vlm: VLM, asked: Sequence[tuple[str, str]], pictures: dict[str, Image.Image], adapter: str | None
) -> list[str]:
    """Answers to (question, key of its picture)."""
    tokens = vlm.encode(pictures)
    with vlm.use(adapter), torch.inference_mode():
        prefix = vlm.embed([vlm.prompt_ids(text) for text, _ in asked], [tokens[key] for _, key in asked])
        return vlm.generate_greedy(vlm.prefill(prefix))


def _dependence(vlm: VLM, suite: Suite, adapter: str | None, config: EvaluateConfig) -> dict[str, float]:
    """Of the true answers, on the same items and masks for every version; nats by item id."""
    count = min(config.dependence_questions, len(suite.items))
    items = random.Random(config.seed).sample(suite.items, count)  # noqa: S311
    said = [Said(item.image_digest, _open(item.image_png), item.question, item.truth) for item in items]
    values = visual_dependence(
        vlm, said, adapter=adapter, rate=config.drop_rate, masks=config.dependence_masks, seed=config.seed
    )
    return {item.id: value for item, value in zip(items, values, strict=True)}


def _scores(measured: Measured) -> dict[str, float]:
    values = measured.dependence.values()
    return {**summarise(measured.outcomes), DEPENDENCE: sum(values) / len(values)}


def _open(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))
