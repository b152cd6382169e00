"""Candidates for dispreferred answers: both branches in one pass, then edits, then agreement."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


def candidates(vlm: VLM, items: Sequence[Item], config: GenerateConfig) -> list[list[Agreed]]:
    """At most k distinct candidates of each item, in the order of preference for them.

    Every prompt is read twice in one batch, with the whole image and with what is overlooked; all that is
    asked of an item afterwards continues these two.
    """
    shown = [Seen((item.id, config.seed), item.image, item.visual) for item in items]
    views = degraded(vlm, shown, config.degrade)
    if config.substitute.mode == "decoded":
        return _decoded(vlm, items, views, config)
    both: list[View | Tensor] = [*(item.visual for item in items), *views]
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
    vlm: VLM, items: Sequence[Item], views: Sequence[View], config: GenerateConfig
) -> list[list[Agreed]]:
    """Distinct draws from P_diff that end by themselves, in the order of their numbers."""
    substitute = config.substitute
    rule = Rule(substitute.beta, sample=True, seed=config.seed)
    requests = [
        Request(item.id, item.prompt, View.whole(item.visual), view, substitute.candidates)
        for item, view in zip(items, views, strict=True)
    ]
    answers = decode(vlm, requests, rule, stop_id=vlm.eos_id, max_tokens=substitute.max_tokens)
    drawn: dict[str, list[Edit]] = {item.id: [] for item in items}
    for answer in sorted(answers, key=lambda answer: answer.number):
        if answer.ids[-1] == vlm.eos_id:
            drawn[answer.key].append(Edit(answer.ids, ()))
    proposed = [_distinct(drawn[item.id], substitute.candidates) for item in items]
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
