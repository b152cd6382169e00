"""Edits made left to right (algorithms §6: 10, 11), on a model."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hscr.config import GenerateConfig
from hscr.contrast.autoregressive import autoregressive_edits
from hscr.contrast.contrast import log_p_diff
from hscr.contrast.degrade import degrade
from hscr.contrast.edit import Branches, Edit, chosen_positions, edits
from hscr.errors import InvalidConfig
from hscr.models.language import Context, View
from hscr.models.vlm import VLM
from tests.tiny_llava import picture

TEXTS = ["yes, there is a small nodule in the left lung", "no", "brain mr with a stone", "..."]
OPEN = {"plausibility": 0.0, "full_plausibility": 0.0}
BETA = 0.9


class Read(NamedTuple):
    """Sources, both views of each, and the context of all."""

    sources: list[Branches]
    views: list[tuple[View, View]]
    context: Context


@pytest.fixture(scope="module")
@torch.no_grad()
def read(vlm: VLM) -> Read:
    prompt = vlm.prompt_ids("is it?")
    tokens = vlm.visual_tokens(vlm.pixel_values([picture(seed) for seed in range(len(TEXTS))]))
    views = [(View.whole(row), degrade(row, 0.7, "delete", "r", seed)) for seed, row in enumerate(tokens)]
    shown = [full for full, _ in views] + [dropped for _, dropped in views]
    context = vlm.prefill(vlm.embed([prompt] * len(shown), shown))
    ids = [vlm.completion_ids(text) for text in TEXTS]
    logits = vlm.completion_logits(context, [[y] for y in ids] * 2)
    both = zip(ids, logits[: len(ids)], logits[len(ids) :], strict=True)
    sources = [Branches(f"record{i}", y, full, dropped) for i, (y, (full,), (dropped,)) in enumerate(both)]
    return Read(sources, views, context)


def config(**substitute: object) -> GenerateConfig:
    values = {"mode": "autoregressive", "order": "pdiff_ascending", **OPEN, **substitute}
    return GenerateConfig.parse({"substitute": values, "sensitive": {"literal_n": True}})


def made(vlm: VLM, read: Read, settings: GenerateConfig) -> list[list[Edit]]:
    with torch.no_grad():
        return autoregressive_edits(vlm, read.context, read.sources, settings)


@torch.no_grad()
def uncached(vlm: VLM, view: View, ids: list[int], position: int) -> Tensor:
    """Logits [V] before ids[position]: one forward of everything, by transformers' own attention."""
    prompts = vlm.embed([[*vlm.prompt_ids("is it?"), *ids[:position]]], [view])
    language = vlm.model.model.language_model
    states = language(
        inputs_embeds=prompts.embeds[0][None],
        position_ids=prompts.positions[0][None],
        attention_mask=torch.ones(1, len(prompts.embeds[0]), dtype=torch.long),
        use_cache=False,
    ).last_hidden_state
    return vlm.logits(states[0, -1])


def p_diff(full: Tensor, dropped: Tensor) -> Tensor:
    return log_p_diff(full.log_softmax(-1), dropped.log_softmax(-1), BETA).exp()


def score(full: Tensor, dropped: Tensor, token: int) -> float:
    """|log p_full - log p_drop| of the token."""
    return abs(float(full.log_softmax(-1)[token] - dropped.log_softmax(-1)[token]))


def test_11_the_edited_prefix_reaches_both_branches_as_without_a_cache(vlm: VLM, read: Read) -> None:
    told_apart = 0
    for source, (whole, partial), found in zip(
        read.sources, read.views, made(vlm, read, config()), strict=True
    ):
        for edit in found:
            for swap in edit.substitutions:
                t = swap.position
                full, dropped = uncached(vlm, whole, edit.ids, t), uncached(vlm, partial, edit.ids, t)
                expected = float(p_diff(full, dropped)[swap.new_id])
                # Half a unit of the fourth decimal is the record's rounding.
                assert swap.contrast_probability == pytest.approx(expected, abs=1e-4 + 5e-5)
                found_score = score(full, dropped, swap.old_id)
                assert swap.sensitivity == pytest.approx(found_score, abs=1e-4 + 5e-5)
                before = [uncached(vlm, view, source.ids, t) for view in (whole, partial)]
                unedited = [(full, before[1]), (before[0], dropped), (before[0], before[1])]
                others = [score(*pair, swap.old_id) for pair in unedited]
                told_apart += all(abs(other - swap.sensitivity) > 1e-2 for other in others)
    # The prefix matters in both branches: had either not been edited, this many would have shown it.
    assert told_apart > 20


def test_11_every_choice_is_the_one_of_its_own_prefix(vlm: VLM, read: Read) -> None:
    from hscr.contrast.edit import place
    from hscr.contrast.sensitive import is_alone

    settings = config(order="plausible", candidates=8)
    differing = 0
    for source, views, found in zip(read.sources, read.views, made(vlm, read, settings), strict=True):
        alone = is_alone(source.ids, vlm.vocabulary.content, settings.sensitive)
        teacher_forced = {edit.ids[-2] for edit in edits(source, vlm.vocabulary, settings)}
        for edit in found:
            for swap in edit.substitutions:
                at = swap.position
                logits = uncached(vlm, views[0], edit.ids, at), uncached(vlm, views[1], edit.ids, at)
                gold = source.ids[at]
                spot = place(gold, logits, vlm.vocabulary, settings, key=source.key, position=at, alone=alone)
                assert swap.new_id in spot.new_ids
            differing += edit.ids[-2] not in teacher_forced
    assert differing > 0


def test_10_an_autoregressive_edit_changes_the_listed_positions_only(vlm: VLM, read: Read) -> None:
    for source, found in zip(read.sources, made(vlm, read, config()), strict=True):
        allowed = set(chosen_positions(source, vlm.vocabulary, config()))
        for edit in found:
            listed = {swap.position: swap.new_id for swap in edit.substitutions}
            assert edit.ids == [listed.get(t, old) for t, old in enumerate(source.ids)]
            assert listed.keys() <= allowed
            assert [swap.position for swap in edit.substitutions] == sorted(listed)
            assert all(swap.old_id == source.ids[swap.position] != swap.new_id for swap in edit.substitutions)


def test_11_at_its_first_position_an_edit_is_the_teacher_forced_one(vlm: VLM, read: Read) -> None:
    left_to_right = made(vlm, read, config(vary_count=False))
    for source, found in zip(read.sources, left_to_right, strict=True):
        forced = list(edits(source, vlm.vocabulary, config(vary_count=False)))
        first = min(chosen_positions(source, vlm.vocabulary, config()), default=None)
        ours = [{s.position: s for s in edit.substitutions}.get(first) for edit in found]
        theirs = [{s.position: s for s in edit.substitutions}.get(first) for edit in forced]
        for one, other in zip(ours, theirs, strict=False):
            assert (one and one.new_id) == (other and other.new_id)


def test_8_one_word_has_one_position_and_punctuation_none(vlm: VLM, read: Read) -> None:
    found = made(vlm, read, config())
    assert found[1]
    assert found[3] == []


def test_11_a_source_gets_the_same_edits_alone(vlm: VLM, read: Read) -> None:
    settings = config(order="sample_pdiff")
    together = made(vlm, read, settings)
    with torch.no_grad():
        for index, source in enumerate(read.sources):
            context = vlm.prefill(vlm.embed([vlm.prompt_ids("is it?")] * 2, read.views[index]))
            (alone,) = autoregressive_edits(vlm, context, [source], settings)
            assert [edit.ids for edit in alone] == [edit.ids for edit in together[index]]


def test_random_negatives_have_no_autoregressive_form() -> None:
    with pytest.raises(InvalidConfig, match="no prefix"):
        config(negatives="random")
