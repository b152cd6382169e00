"""From a question and its right answer to a preference record (HSCR §3.1-3.2)."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from hscr.config import GenerateConfig
from hscr.contrast.agree import Agreed, agree
from hscr.contrast.degrade import degrade
from hscr.contrast.rerank import levels, similarities, words
from hscr.contrast.substitute import Branches, Edit, edits
from hscr.errors import InvalidInput, InvalidRecord, JobCancelled
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord, PreferenceSource, Response

Source = tuple[PreferenceSource, Image.Image]


@dataclass(frozen=True)
class Skipped:
    """A source that gave no record, and why, in words without patient data."""

    source_id: str
    reason: str


@dataclass(frozen=True)
class _Prepared:
    source: PreferenceSource
    visual: Tensor
    prompt: list[int]
    ids: list[int]


def generate(
    vlm: VLM,
    sources: Iterable[Source],
    config: GenerateConfig,
    *,
    adapter: str | None = None,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[PreferenceRecord | Skipped]:
    """One record, or the reason for none, per source and in the sources' order.

    `adapter` names the loaded adapter that both branches answer with; None is the base model. The same
    source, configuration, model and adapter give the same record, with the same id, in any batch.
    `on_progress(done, kept)` follows each batch, before which `should_stop` may raise JobCancelled.
    """
    done = kept = 0
    visual: dict[str, Tensor] = {}
    for batch in _batches(sources, batch_size):
        if should_stop():
            raise JobCancelled(f"Stopped after {done} sources.", remedy="Submit the job again.")
        # Neighbouring questions share images: what the last batch encoded is kept for this one.
        images = {source.image_digest: image for source, image in batch}
        fresh = vlm.encode({key: image for key, image in images.items() if key not in visual})
        visual = {key: fresh[key] if key in fresh else visual[key] for key in images}
        with vlm.use(adapter), torch.inference_mode():
            outcomes = _generate_batch(vlm, [source for source, _ in batch], visual, config, adapter)
        done += len(outcomes)
        kept += sum(isinstance(outcome, PreferenceRecord) for outcome in outcomes)
        yield from outcomes
        on_progress(done, kept)


def _generate_batch(
    vlm: VLM,
    sources: Sequence[PreferenceSource],
    visual: dict[str, Tensor],
    config: GenerateConfig,
    adapter: str | None,
) -> list[PreferenceRecord | Skipped]:
    prepared = [_prepare(vlm, source, visual[source.image_digest]) for source in sources]
    usable = [item for item in prepared if isinstance(item, _Prepared)]
    made = iter(_responses(vlm, usable, config) if usable else [])
    outcomes: list[PreferenceRecord | Skipped] = []
    for source, item in zip(sources, prepared, strict=True):
        result = item if isinstance(item, Skipped) else next(made)
        outcomes.append(_outcome(source, result, vlm.digest, config, adapter))
    return outcomes


def _prepare(vlm: VLM, source: PreferenceSource, visual: Tensor) -> _Prepared | Skipped:
    try:
        return _Prepared(source, visual, vlm.prompt_ids(source.question), vlm.completion_ids(source.chosen))
    except InvalidInput as error:
        return Skipped(source.id, error.detail)


def _responses(
    vlm: VLM, items: Sequence[_Prepared], config: GenerateConfig
) -> list[tuple[Response, ...] | Skipped]:
    """Dispreferred answers of each item by descending similarity."""
    prompts = [item.prompt for item in items]
    rate, mode = config.degrade.rate, config.degrade.mode
    degraded = [degrade(item.visual, rate, mode, item.source.id, config.seed) for item in items]
    seen = vlm.prefill(vlm.embed(prompts, [item.visual for item in items]))
    full = vlm.completion_logits(seen, [[item.ids] for item in items])
    overlooked = vlm.prefill(vlm.embed(prompts, degraded))
    dropped = vlm.completion_logits(overlooked, [[item.ids] for item in items])
    proposals = []
    for item, (z_full,), (z_drop,) in zip(items, full, dropped, strict=True):
        branches = Branches(item.source.id, item.ids, z_full.cpu(), z_drop.cpu())
        proposals.append(_distinct(edits(branches, vlm.vocabulary, config), config.substitute.candidates))
    substitute = config.substitute
    random = substitute.negatives == "random"
    # The control stays as it was drawn: what it would become in agreement is no longer random.
    plausibility, rounds = (0.0, 0) if random else (substitute.plausibility, substitute.rounds)
    agreed = agree(vlm, seen, proposals, plausibility=plausibility, rounds=rounds)
    return [_ranked(vlm, item.source, found, config) for item, found in zip(items, agreed, strict=True)]


def _distinct(candidates: Iterable[Edit], limit: int) -> list[Edit]:
    found: dict[tuple[int, ...], Edit] = {}
    for edit in candidates:
        found.setdefault(tuple(edit.ids), edit)
        if len(found) == limit:
            break
    return list(found.values())


def _ranked(
    vlm: VLM, source: PreferenceSource, candidates: Sequence[Agreed], config: GenerateConfig
) -> tuple[Response, ...] | Skipped:
    if not candidates:
        return Skipped(source.id, "No word of the answer has a plausible substitute.")
    random = config.substitute.negatives == "random"
    floor = 0.0 if random else config.substitute.min_probability
    probable = [candidate for candidate in candidates if candidate.mean_probability >= floor]
    if not probable:
        return Skipped(source.id, f"No candidate is as probable as {floor}.")
    readable = _readable(vlm, source.chosen, probable)
    if not readable:
        return Skipped(source.id, "Every candidate reads like the answer or is no text of its own.")
    scores = similarities(source.chosen, [text for text, _ in readable], config.rerank)
    return tuple(
        Response(
            text=readable[index][0],
            similarity=scores[index],
            mean_probability=readable[index][1].mean_probability,
            substitutions=readable[index][1].edit.substitutions,
        )
        for index in levels(scores, config.rerank)
    )


def _readable(vlm: VLM, chosen: str, candidates: Sequence[Agreed]) -> list[tuple[str, Agreed]]:
    """Candidates that read differently from y_w and one another, and tokenise as they were made."""
    said = {tuple(words(chosen))}
    found: list[tuple[str, Agreed]] = []
    for candidate in candidates:
        text = vlm.text(candidate.ids)
        spoken = tuple(words(text))
        if spoken and spoken not in said and _tokenises_as(vlm, text, candidate.ids):
            said.add(spoken)
            found.append((text, candidate))
    return found


def _tokenises_as(vlm: VLM, text: str, ids: list[int]) -> bool:
    try:
        return vlm.completion_ids(text) == ids
    except InvalidRecord:
        # Harmless tokens can spell a control token.
        return False


def _outcome(
    source: PreferenceSource,
    rejected: tuple[Response, ...] | Skipped,
    model_digest: str,
    config: GenerateConfig,
    adapter: str | None,
) -> PreferenceRecord | Skipped:
    if isinstance(rejected, Skipped):
        return rejected
    if not rejected:
        return Skipped(source.id, "No candidate is far enough from the answer.")
    made = "\0".join([source.id, config.digest, model_digest, adapter or ""])
    return PreferenceRecord(
        **source.model_dump(exclude={"id"}),
        id=f"pref_{hashlib.sha256(made.encode()).hexdigest()[:32]}",
        rejected=rejected,
        source=source.id,
        method=config.substitute.negatives,
        model_digest=model_digest,
        adapter=adapter,
        config_digest=config.digest,
    )


def _batches(sources: Iterable[Source], size: int) -> Iterator[list[Source]]:
    batch: list[Source] = []
    for source in sources:
        batch.append(source)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
