"""Dropout and the contrast of the branches (algorithms §6: 1-5)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hscr.contrast.contrast import log_p_diff, plausible, quantised
from hscr.contrast.degrade import degrade, kept_tokens
from hscr.contrast.sensitive import jensen_shannon
from hscr.models.vlm import VLM
from tests.tiny_llava import picture

FULL = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
DROPPED = torch.tensor([[1.0, 1.0, 1.0, -1.0]])


def test_1_without_contrast_p_diff_is_the_full_softmax() -> None:
    torch.testing.assert_close(log_p_diff(FULL, DROPPED, 0.0), FULL.log_softmax(-1), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["delete", "zero"])
def test_2_rate_0_is_a_bit_exact_no_op(vlm: VLM, mode: str) -> None:
    (visual,) = vlm.visual_tokens(vlm.pixel_values([picture(1)]))
    prompt, answer = vlm.prompt_ids("is it?"), vlm.completion_ids("yes, left.")
    kept = degrade(visual, 0.0, mode, "any")
    full, dropped = (
        vlm.completion_logits(vlm.prefill(vlm.embed([prompt], [view])), [[answer]])[0][0]
        for view in (visual, kept)
    )
    assert torch.equal(full, dropped)
    for beta in (0.0, 0.9, 5.0):
        torch.testing.assert_close(log_p_diff(full, dropped, beta), full.log_softmax(-1), atol=1e-5, rtol=0)


def test_3_constants_on_a_row_change_nothing() -> None:
    moved = log_p_diff(FULL + 7, DROPPED - 3, 0.9)
    torch.testing.assert_close(moved, log_p_diff(FULL, DROPPED, 0.9))


def test_4_four_tokens_by_hand() -> None:
    # 1.9 z_full - 0.9 z_drop = [2.9, 1.0, -0.9, -1.0]
    expected = torch.tensor([[18.17415, 2.71828, 0.40657, 0.36788]]) / 21.66688
    torch.testing.assert_close(log_p_diff(FULL, DROPPED, 0.9).exp(), expected, atol=1e-5, rtol=0)


@given(count=st.integers(1, 600), rate=st.floats(0, 1), key=st.text(max_size=8))
def test_5_exactly_the_rounded_share_is_kept_in_order(count: int, rate: float, key: str) -> None:
    kept = kept_tokens(count, rate, key, 0)
    assert len(kept) == round((1 - rate) * count)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert torch.equal(kept, kept_tokens(count, rate, key, 0))


def test_5_the_key_alone_decides() -> None:
    torch.manual_seed(1)
    first = kept_tokens(576, 0.7, "record", 0)
    torch.manual_seed(2)
    assert torch.equal(first, kept_tokens(576, 0.7, "record", 0))
    assert not torch.equal(first, kept_tokens(576, 0.7, "record", 1))
    assert not torch.equal(first, kept_tokens(576, 0.7, "another", 0))
    assert len(first) == 173


def test_5_zero_keeps_places_and_delete_keeps_order() -> None:
    visual = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    zeroed, deleted = (degrade(visual, 0.7, mode, "k").tokens for mode in ("zero", "delete"))
    assert zeroed.shape == visual.shape
    assert torch.equal(zeroed[zeroed.abs().sum(-1) > 0], deleted)
    assert torch.equal(deleted, visual[kept_tokens(10, 0.7, "k")])


@torch.no_grad()
def test_5_rate_1_leaves_the_text_alone(vlm: VLM) -> None:
    (visual,) = vlm.visual_tokens(vlm.pixel_values([picture(1)]))
    prompts = vlm.embed([vlm.prompt_ids("is it?")], [degrade(visual, 1.0, "delete", "k")])
    assert len(prompts.embeds[0]) == prompts.ends[0] == len(vlm.prompt_ids("is it?")) - 1
    assert torch.isfinite(vlm.prefill(prompts).last).all()


def test_quantised_hides_numeric_noise() -> None:
    assert torch.equal(quantised(torch.tensor([-1.2341])), quantised(torch.tensor([-1.23405])))


def test_plausible_is_relative_to_the_first_choice() -> None:
    logprobs = torch.tensor([0.6, 0.3, 0.07, 0.03]).log()
    assert plausible(logprobs, 0.1).tolist() == [True, True, True, False]
    assert plausible(logprobs, 0).all()


@torch.no_grad()
def test_36_divergence_on_selected_rows_equals_that_of_the_full_tensor(vlm: VLM) -> None:
    """Only states of answer tokens reach the head; the oracle has logits everywhere and masks afterwards."""
    (visual,) = vlm.visual_tokens(vlm.pixel_values([picture(1)]))
    prompt, answer = vlm.prompt_ids("is it?"), vlm.completion_ids("yes, left.")
    views = [visual, degrade(visual, 0.7, "zero", "any").tokens]
    rows = [vlm.completion_logits(vlm.prefill(vlm.embed([prompt], [v])), [[answer]])[0][0] for v in views]
    found = jensen_shannon(*(row.log_softmax(-1) for row in rows))
    everywhere = []
    for view in views:
        embeds = torch.cat([vlm.embed([prompt], [view]).embeds[0], vlm.embed_ids(torch.tensor(answer))])
        everywhere.append(vlm.model(inputs_embeds=embeds[None]).logits[0].double().softmax(-1))
    p, q = everywhere
    middle = (p + q) / 2
    both = [(x * (x.log() - middle.log())).sum(-1) for x in (p, q)]
    mask = torch.zeros(len(p), dtype=torch.bool)
    mask[len(p) - len(answer) - 1 : -1] = True
    expected = (both[0] + both[1])[mask] / 2
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-4)
    assert float(expected.max()) > 1e-3
