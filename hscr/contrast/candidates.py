"""Candidates for dispreferred answers: both branches in one pass, then edits, then agreement."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from hscr.config import GenerateConfig
from hscr.contrast.agree import Agreed, agree
from hscr.contrast.autoregressive import autoregressive_edits
from hscr.contrast.decode import Request, Rule, decode
from hscr.contrast.degrade import Seen, degraded
from hscr.contrast.edit import Branches, Edit, edits
from hscr.models.language import Context, View
from hscr.models.vlm import VLM


@dataclass(frozen=True)
class Item:
    """A source as the model reads it."""

    id: str
    image: Image.Image
    visual: Tensor
    """[N, d]: the whole image's visual tokens"""
    prompt: list[int]
    ids: list[int]
    """the preferred answer, end-of-sequence last"""


class _Drawn(NamedTuple):
    """A batch of items, and their answers' ids by the items' ids and the answers' numbers."""

    items: Sequence[Item]
    answers: dict[str, dict[int, list[int]]]

    def complete(self, count: int) -> bool:
        return all(len(answers) == count for answers in self.answers.values())

    def ended(self, key: str, stop_id: int) -> list[Edit]:
        """The answers of an item that ended by themselves, in the order of their numbers."""
        return [Edit(ids, ()) for _, ids in sorted(self.answers[key].items()) if ids[-1] == stop_id]


def candidates(
    vlm: VLM, batches: Iterable[Sequence[Item]], config: GenerateConfig, *, compiled: bool = False
) -> Iterator[list[list[Agreed]]]:
    """At most k distinct candidates of each item of each batch, in the order of preference for them."""
    if config.substitute.mode == "decoded":
        yield from _decoded(vlm, batches, config, compiled=compiled)
    else:
        for items in batches:
            yield _substituted(vlm, items, config) if items else []


def _overlooking(vlm: VLM, items: Sequence[Item], config: GenerateConfig) -> list[View]:
    """Each image as the dropped stream sees it."""
    shown = [Seen((item.id, config.seed), item.image, item.visual) for item in items]
    return degraded(vlm, shown, config.degrade)


def _substituted(vlm: VLM, items: Sequence[Item], config: GenerateConfig) -> list[list[Agreed]]:
    """Words of the preferred answer in exchange for hallucinated ones.

    Every prompt is read twice in one batch, with the whole image and with what is overlooked; all that is
    asked of an item afterwards continues these two.
    """
    both: list[View | Tensor] = [*(item.visual for item in items), *_overlooking(vlm, items, config)]
    context = vlm.prefill(vlm.embed([item.prompt for item in items] * 2, both))
    proposed = _proposals(vlm, context, items, config)
    substitute = config.substitute
    # The control stays as it was drawn: what it would become in agreement is no longer random.
    free = substitute.negatives == "random"
    plausibility, rounds = (0.0, 0) if free else (substitute.plausibility, substitute.rounds)
    nothing: list[list[Edit]] = [[] for _ in items]
    agreed = agree(vlm, context, proposed + nothing, plausibility=plausibility, rounds=rounds)
    return agreed[: len(items)]


def _decoded(
    vlm: VLM, batches: Iterable[Sequence[Item]], config: GenerateConfig, *, compiled: bool
) -> Iterator[list[list[Agreed]]]:
    """Distinct draws from P_diff that end by themselves, in the order of their numbers.

    Items of later batches are decoded while the last answers of earlier ones go on.
    """
    substitute = config.substitute
    rule = Rule(substitute.beta, sample=True, seed=config.seed)
    waiting: deque[_Drawn] = deque()

    def requests() -> Iterator[Request]:
        for items in batches:
            waiting.append(_Drawn(items, {item.id: {} for item in items}))
            for item, view in zip(items, _overlooking(vlm, items, config), strict=True):
                yield Request(item.id, item.prompt, View.whole(item.visual), view, substitute.candidates)

    def complete() -> Iterator[list[list[Agreed]]]:
        while waiting and waiting[0].complete(substitute.candidates):
            batch = waiting.popleft()
            yield _as_drawn(vlm, batch, substitute.candidates) if batch.items else []

    answers = decode(
        vlm, requests(), rule, stop_id=vlm.eos_id, max_tokens=substitute.max_tokens, compiled=compiled
    )
    for answer in answers:
        for batch in waiting:
            if answer.key in batch.answers:
                batch.answers[answer.key][answer.number] = answer.ids
        yield from complete()
    yield from complete()  # batches without items


def _as_drawn(vlm: VLM, batch: "_Drawn", limit: int) -> list[list[Agreed]]:
    items = batch.items
    proposed = [_distinct(batch.ended(item.id, vlm.eos_id), limit) for item in items]
    context = vlm.prefill(vlm.embed([item.prompt for item in items], [item.visual for item in items]))
    agreed = agree(vlm, context, proposed, plausibility=0.0, rounds=0)
    # All that differs from the preferred answer is a change; nothing of it was substituted.
    return [
        [one._replace(edit=Edit(item.ids, ())) for one in found]
        for item, found in zip(items, agreed, strict=True)
    ]


def _proposals(vlm: VLM, context: Context, items: Sequence[Item], config: GenerateConfig) -> list[list[Edit]]:
    states = vlm.completion_states(context, [[item.ids] for item in items] * 2)
    both = zip(items, states[: len(items)], states[len(items) :], strict=True)
    # One source's logits at a time: a vocabulary is wide.
    sources = (
        Branches(item.id, item.ids, vlm.logits(full), vlm.logits(dropped))
        for item, (full,), (dropped,) in both
    )
    if config.substitute.mode == "autoregressive":
        made: Iterable[Iterable[Edit]] = autoregressive_edits(vlm, context, sources, config)
    else:
        made = (edits(source, vlm.vocabulary, config) for source in sources)
    return [_distinct(found, config.substitute.candidates) for found in made]


def _distinct(found: Iterable[Edit], limit: int) -> list[Edit]:
    distinct: dict[tuple[int, ...], Edit] = {}
    for edit in found:
        distinct.setdefault(tuple(edit.ids), edit)
        if len(distinct) == limit:
            break
    return list(distinct.values())
