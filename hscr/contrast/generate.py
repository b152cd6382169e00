"""From a question and its right answer to a preference record (HSCR §3.1-3.2)."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from hscr.config import GenerateConfig
from hscr.contrast.agree import Agreed
from hscr.contrast.candidates import Item, candidates
from hscr.contrast.embedder import Embedder, SentenceEmbedder
from hscr.contrast.rerank import levels, similarities, words
from hscr.errors import InvalidConfig, InvalidInput, InvalidRecord, JobCancelled
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord, PreferenceSource, Response

Source = tuple[PreferenceSource, Image.Image]


@dataclass(frozen=True)
class Skipped:
    """A source that gave no record, and why, in words without patient data."""

    source_id: str
    reason: str


def generate(
    vlm: VLM,
    sources: Iterable[Source],
    config: GenerateConfig,
    *,
    adapter: str | None = None,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
    embedder: Embedder | None = None,
    compiled: bool = False,
) -> Iterator[PreferenceRecord | Skipped]:
    """One record, or the reason for none, per source and in the sources' order.

    `adapter` names the loaded adapter that both branches answer with; None is the base model. The same
    source, configuration, model and adapter give the same id and answers in any batch; scores differ with
    the batch by fp32 rounding. No more than a batch of sources is held at a time, and in mode `decoded` those
    that have a slot and their batches' others. `embedder` takes the place of the configuration's.
    `on_progress(done, kept)` follows each batch, before which `should_stop` may raise JobCancelled.
    `compiled` runs the steps of mode `decoded` as `hscr.contrast.decode` says, and the records' numeric mode
    names it. Raises DependencyMissing or InvalidConfig when the configuration's embedder cannot be loaded,
    InvalidConfig also for `compiled` in a mode without such steps.
    """
    check_compiled(config, compiled=compiled)
    done = kept = 0

    def batches() -> Iterator[tuple[list[Source], dict[str, Tensor]]]:
        visual: dict[str, Tensor] = {}
        for batch in _batches(sources, batch_size):
            if should_stop():
                raise JobCancelled(f"Stopped after {done} sources.", remedy="Submit the job again.")
            # Neighbouring questions share images: what the last batch encoded is kept for this one.
            images = {source.image_digest: image for source, image in batch}
            fresh = vlm.encode({key: image for key, image in images.items() if key not in visual})
            visual = {key: fresh[key] if key in fresh else visual[key] for key in images}
            yield batch, visual

    maker = _Maker(vlm, config, adapter, find_embedder(config, vlm.device, embedder), compiled)
    made = maker.outcomes(batches())
    while True:
        with vlm.use(adapter), torch.inference_mode():  # not while the caller has what was made
            outcomes = next(made, None)
        if outcomes is None:
            return
        done += len(outcomes)
        kept += sum(isinstance(outcome, PreferenceRecord) for outcome in outcomes)
        yield from outcomes
        on_progress(done, kept)


def check_compiled(config: GenerateConfig, *, compiled: bool) -> None:
    """Raises InvalidConfig for `compiled` in a mode without steps."""
    if compiled and config.substitute.mode != "decoded":
        raise InvalidConfig(
            f"Mode {config.substitute.mode} has no steps to compile.",
            remedy="Leave it out, or set substitute.mode = 'decoded'.",
        )


def find_embedder(
    config: GenerateConfig, device: torch.device | str, given: Embedder | None = None
) -> Embedder | None:
    """What the configuration compares answers by, if by meaning. Raises DependencyMissing, InvalidConfig."""
    if config.rerank.similarity != "sentence_embedding":
        return None
    return given or SentenceEmbedder.find(config.rerank.embedder, device)


@dataclass(frozen=True)
class _Maker:
    """What makes records of a batch, and is named in them."""

    vlm: VLM
    config: GenerateConfig
    adapter: str | None
    embedder: Embedder | None
    compiled: bool

    def outcomes(
        self, batches: Iterable[tuple[list[Source], dict[str, Tensor]]]
    ) -> Iterator[list[PreferenceRecord | Skipped]]:
        """Of each batch of sources, with the visual tokens of their images by digest."""
        begun: deque[list[tuple[PreferenceSource, Item | Skipped]]] = deque()

        def items() -> Iterator[list[Item]]:
            for batch, visual in batches:
                begun.append([(s, self._item(s, image, visual[s.image_digest])) for s, image in batch])
                yield [item for _, item in begun[-1] if isinstance(item, Item)]

        for batch in candidates(self.vlm, items(), self.config, compiled=self.compiled):
            found = iter(batch)
            yield [
                item if isinstance(item, Skipped) else self._outcome(source, next(found))
                for source, item in begun.popleft()
            ]

    def _item(self, source: PreferenceSource, image: Image.Image, visual: Tensor) -> Item | Skipped:
        try:
            prompt, ids = self.vlm.prompt_ids(source.question), self.vlm.completion_ids(source.chosen)
        except InvalidInput as error:
            return Skipped(source.id, error.detail)
        length = len(prompt) - 1 + self.vlm.image_token_count + len(ids)  # the image has one id in a prompt
        if length > self.vlm.context:
            return Skipped(
                source.id,
                f"Prompt, image and answer have {length} tokens; the model reads {self.vlm.context} at most.",
            )
        return Item(source.id, image, visual, prompt, ids)

    def _outcome(self, source: PreferenceSource, found: Sequence[Agreed]) -> PreferenceRecord | Skipped:
        if not found:
            return Skipped(source.id, "No word of the answer has a plausible substitute.")
        floor = (
            0.0 if self.config.substitute.negatives == "random" else self.config.substitute.min_probability
        )
        probable = [candidate for candidate in found if candidate.mean_probability >= floor]
        if not probable:
            return Skipped(source.id, f"No candidate is as probable as {floor}.")
        readable = _readable(self.vlm, source.chosen, probable)
        if not readable:
            return Skipped(source.id, "Every candidate reads like the answer or is no text of its own.")
        rejected = self._levels(source.chosen, readable)
        if not rejected:
            return Skipped(source.id, "No candidate is far enough from the answer.")
        return self._record(source, rejected)

    def _levels(self, chosen: str, readable: Sequence[tuple[str, Agreed]]) -> tuple[Response, ...]:
        rerank = self.config.rerank
        scores = similarities(chosen, [text for text, _ in readable], rerank, self.embedder)
        return tuple(
            Response(
                text=readable[index][0],
                similarity=scores[index],
                mean_probability=readable[index][1].mean_probability,
                substitutions=readable[index][1].edit.substitutions,
                changes=readable[index][1].changes,
            )
            for index in levels(scores, rerank)
        )

    def _record(self, source: PreferenceSource, rejected: tuple[Response, ...]) -> PreferenceRecord:
        embedder = self.embedder.identity if self.embedder else None
        made = [source.id, self.config.digest, self.vlm.digest, self.adapter or "", embedder or ""]
        digest = hashlib.sha256("\0".join(made).encode()).hexdigest()
        return PreferenceRecord(
            **source.model_dump(exclude={"id"}),
            id=f"pref_{digest[:32]}",
            rejected=rejected,
            source=source.id,
            method=self.config.substitute.negatives,
            model_digest=self.vlm.digest,
            adapter=self.adapter,
            numeric_mode=numeric_mode(self.vlm, compiled=self.compiled),
            config_digest=self.config.digest,
            seed=self.config.seed,
            embedder=embedder,
        )


def numeric_mode(vlm: VLM, *, compiled: bool) -> str:
    """As records name it: compiled steps round otherwise."""
    return f"{vlm.numeric_mode}, compiled" if compiled else vlm.numeric_mode


def _readable(vlm: VLM, chosen: str, probable: Sequence[Agreed]) -> list[tuple[str, Agreed]]:
    """Candidates that read differently from y_w and one another, and tokenise as they were made."""
    said = {tuple(words(chosen))}
    found: list[tuple[str, Agreed]] = []
    for candidate in probable:
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


def _batches(sources: Iterable[Source], size: int) -> Iterator[list[Source]]:
    batch: list[Source] = []
    for source in sources:
        batch.append(source)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
