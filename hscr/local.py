"""The loop's science on this machine without any service: files in, files out. Imports torch."""

import hashlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from hscr.config import EvaluateConfig, FinetuneConfig, GenerateConfig
from hscr.contrast.dependence import Said, visual_dependence
from hscr.contrast.generate import Skipped, generate
from hscr.errors import NotFound
from hscr.evaluate.gate import Judgement, Measured, judge
from hscr.evaluate.metrics import DEPENDENCE, Outcome, score, summarise
from hscr.evaluate.suites import Suite, load_suite
from hscr.imaging.decode import Prepared, prepare
from hscr.imaging.guard import Limits
from hscr.learn.trainer import FinetuneResult, finetune
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord, PreferenceSource
from hscr.rows import Row, read_rows, row_image
from hscr.store.export import Exported, export, image_path, read_records

BASE, CANDIDATE = "base", "candidate"
_BATCH = 32

Progress = Callable[[int, int], None]


class Generated(NamedTuple):
    exported: Exported
    skipped: list[Skipped]


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
    with _using(vlm, adapter) as name:
        return _greedy(vlm, [(question, "image")], {"image": picture}, name)[0]


def generate_records(
    model: Path,
    rows: Path,
    images: Path,
    folder: Path,
    config: GenerateConfig,
    *,
    adapter: Path | None = None,
    on_progress: Progress = lambda _done, _total: None,
) -> Generated:
    """Make dispreferred answers for JSONL rows and write them as a `jsonl` export to `folder`.

    Raises InvalidRecord that names a line, InvalidImage, Conflict when `folder` holds something.
    """
    read = read_rows(rows)
    prepared = {row.image: prepare(row_image(images, row), limits=Limits()) for row in read}
    sources = [_source(row, prepared[row.image]) for row in read]
    pictures = {item.image.digest: item.png for item in prepared.values()}
    vlm = VLM.load(model)
    skipped: list[Skipped] = []

    def progress(done: int, _kept: int) -> None:
        on_progress(done, len(sources))

    def records(name: str | None) -> Iterator[PreferenceRecord]:
        pairs = ((source, _open(pictures[source.image_digest])) for source in sources)
        for made in generate(vlm, pairs, config, adapter=name, on_progress=progress):
            if isinstance(made, Skipped):
                skipped.append(made)
            else:
                yield made

    with _using(vlm, adapter) as name:
        exported = export(records(name), pictures.__getitem__, folder, "jsonl")
    return Generated(exported, skipped)


def finetune_records(
    model: Path,
    records: Path,
    folder: Path,
    config: FinetuneConfig,
    *,
    on_progress: Callable[[int, int, dict[str, float]], None] = lambda _step, _steps, _metrics: None,
) -> FinetuneResult:
    """Train an adapter on a `jsonl` export and write it to `folder`. Raises InvalidRecord, NotFound."""
    read = read_records(records)
    digests = {record.image_digest for record in read}
    pictures = {digest: _stored(records.parent / image_path(digest)) for digest in digests}
    examples = [(record, pictures[record.image_digest]) for record in read]
    return finetune(VLM.load(model), examples, config, out_dir=folder, on_progress=on_progress)


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
    with _using(vlm, adapter) as name:
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


@contextmanager
def _using(vlm: VLM, adapter: Path | None) -> Iterator[str | None]:
    """The name under which the adapter folder is loaded inside the block; None without one."""
    if adapter is None:
        yield None
        return
    if not (adapter / "adapter_config.json").is_file():
        raise NotFound(f"{adapter} holds no adapter.", remedy="Give a folder that `hscr finetune` wrote.")
    vlm.load_adapter(adapter, CANDIDATE)
    yield CANDIDATE


def _source(row: Row, prepared: Prepared) -> PreferenceSource:
    digest = prepared.image.digest
    made = "\0".join([digest, row.question, row.answer])
    return PreferenceSource(
        id=row.id or f"row_{hashlib.sha256(made.encode()).hexdigest()[:32]}",
        image_digest=digest,
        study=row.study or f"local-{digest[:16]}",
        question=row.question,
        chosen=row.answer,
        consent=True,
    )


def _stored(path: Path) -> Image.Image:
    try:
        return _open(path.read_bytes())
    except OSError as error:
        raise NotFound(
            f"The image {path} is missing.", remedy="Keep `images/` beside the records file."
        ) from error


def _open(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))
