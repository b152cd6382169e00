"""Every way to overlook (algorithms §6: 2, 5-7), on a model."""

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaForConditionalGeneration

from hscr.config import DegradeConfig
from hscr.contrast.degrade import Seen, cropped, degraded, kept_tokens, visible_entries
from hscr.errors import InvalidConfig
from hscr.models.language import View
from hscr.models.vision import Vision
from hscr.models.vlm import VLM
from tests.tiny_llava import picture

WAYS = [
    {},
    {"positions": "keep_original"},
    {"mode": "zero"},
    {"mode": "attn_mask", "positions": "keep_original"},
    {"kind": "pixel"},
    {"kind": "patch"},
    {"kind": "patch", "positions": "keep_original"},
    {"kind": "latent"},
]


def shown(vlm: VLM, *seeds: int) -> list[Seen]:
    images = {str(seed): picture(seed) for seed in seeds}
    tokens = vlm.encode(images)
    return [Seen((f"record{key}", 0), images[key], tokens[key]) for key in images]


def views(vlm: VLM, items: list[Seen], rate: float, **way: str) -> list[View]:
    return degraded(vlm, items, DegradeConfig.parse({"rate": rate, **way}))


def last(vlm: VLM, view: View) -> torch.Tensor:
    """The state the first answer token is predicted from."""
    return vlm.prefill(vlm.embed([vlm.prompt_ids("is it?")], [view])).last


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_2_rate_0_is_a_bit_exact_no_op_in_every_way(vlm: VLM, way: dict[str, str]) -> None:
    items = shown(vlm, 1, 2)
    for item, view in zip(items, views(vlm, items, 0.0, **way), strict=True):
        assert torch.equal(view.tokens, item.tokens)
        assert view.at.tolist() == list(range(16))
        assert view.span == 16
        assert torch.equal(last(vlm, view), last(vlm, View.whole(item.tokens)))


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rate", [0.3, 0.7, 1.0])
def test_5_every_way_leaves_so_many_tokens_and_answers_finitely(
    vlm: VLM, way: dict[str, str], rate: float
) -> None:
    (item,) = shown(vlm, 1)
    (view,) = views(vlm, [item], rate, **way)
    stays = way.get("mode") == "zero" or way.get("kind") in {"pixel", "latent"}
    count = 16 if stays else round((1 - rate) * 16)
    assert view.tokens.shape == (count, item.tokens.shape[1])
    assert len(view.at) == count
    kept_places = "positions" in way
    assert view.span == (16 if kept_places or stays else count)
    kept = kept_tokens(16, rate, "record1", 0).tolist()
    assert view.at.tolist() == (kept if kept_places else list(range(count)))
    assert torch.isfinite(last(vlm, view)).all()


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_5_what_is_dropped_depends_on_record_and_seed_alone(vlm: VLM, way: dict[str, str]) -> None:
    items = shown(vlm, 1, 2, 3)
    together = views(vlm, items, 0.7, **way)
    for item, view in zip(items, together, strict=True):
        (alone,) = views(vlm, [item], 0.7, **way)
        torch.testing.assert_close(alone.tokens, view.tokens, atol=1e-5, rtol=0)
        assert torch.equal(alone.at, view.at)
        for key in (("another", 0), (item.key[0], 1)):
            (other,) = views(vlm, [item._replace(key=key)], 0.7, **way)
            assert not torch.allclose(other.tokens, view.tokens)


@torch.no_grad()
def test_6_visual_tokens_are_dropped_after_the_projector_and_shorten_the_prompt(vlm: VLM) -> None:
    (item,) = shown(vlm, 1)
    (view,) = views(vlm, [item], 0.7)
    kept = kept_tokens(16, 0.7, "record1", 0)
    # Dropped any earlier, the tokens left would have mixed with fewer others and differ.
    assert torch.equal(view.tokens, item.tokens[kept])
    prompt = vlm.prompt_ids("is it?")
    whole, shorter = (vlm.embed([prompt], [shown]) for shown in (item.tokens, view))
    assert len(whole.embeds[0]) - len(shorter.embeds[0]) == 16 - len(kept) == 11
    text = [place for place, token in enumerate(prompt) if token != vlm.image_token_id]
    after = [place + len(kept) - 1 if place > prompt.index(vlm.image_token_id) else place for place in text]
    assert torch.equal(shorter.embeds[0][after], vlm.embed_ids(torch.tensor(prompt))[text])


@torch.no_grad()
def test_7_latent_masking_at_1_leaves_each_token_to_itself(vlm: VLM) -> None:
    items = shown(vlm, 1)
    (view,) = views(vlm, items, 1.0, kind="latent")
    assert torch.isfinite(view.tokens).all()
    vision = Vision.of(vlm.model)
    embedded = vision.embed(vlm.pixel_values([items[0].image]))
    for patch, token in enumerate(view.tokens):
        (alone,) = vision.tokens(embedded[:, [0, 1 + patch]], torch.eye(2, dtype=torch.bool)[None])
        torch.testing.assert_close(token, alone[0], atol=1e-5, rtol=0)


@given(count=st.integers(1, 40), rate=st.floats(0, 1), key=st.text(max_size=8))
def test_7_exactly_the_rounded_share_of_entries_is_hidden_and_no_diagonal(
    count: int, rate: float, key: str
) -> None:
    visible = visible_entries(count, rate, key)
    assert int((~visible).sum()) == round(rate * (count * (count - 1)))
    assert visible.diagonal().all()
    assert torch.equal(visible, visible_entries(count, rate, key))


@torch.no_grad()
@pytest.mark.parametrize("rate", [0.3, 0.7, 1.0])
def test_5_hidden_from_attention_is_deleted_in_place_as_transformers_does_it(
    vlm: VLM, folder: Path, rate: float
) -> None:
    """The oracle: transformers' whole forward with a 2-D mask of zeros at the dropped tokens."""
    (item,) = shown(vlm, 1)
    (hidden,) = views(vlm, [item], rate, mode="attn_mask", positions="keep_original")
    (deleted,) = views(vlm, [item], rate, positions="keep_original")
    prompt, answer = vlm.prompt_ids("is it?"), vlm.completion_ids("yes, left.")
    at = prompt.index(vlm.image_token_id)
    ids = torch.tensor([[*prompt[:at], *[vlm.image_token_id] * 16, *prompt[at + 1 :], *answer[:-1]]])
    mask = torch.ones_like(ids)
    mask[0, at : at + 16] = 0
    mask[0, at + kept_tokens(16, rate, "record1", 0)] = 1
    oracle = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    logits = oracle(
        input_ids=ids,
        pixel_values=vlm.pixel_values([item.image]),
        attention_mask=mask,
        position_ids=torch.arange(ids.shape[1])[None],
        use_cache=False,
    ).logits[0, -len(answer) :]
    for view in (hidden, deleted):
        ours = vlm.completion_logits(vlm.prefill(vlm.embed([prompt], [view])), [[answer]])[0][0]
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)
    (closed,) = views(vlm, [item], rate)
    reindexed = vlm.completion_logits(vlm.prefill(vlm.embed([prompt], [closed])), [[answer]])[0][0]
    assert (reindexed - logits).abs().max() > 1e-3


@torch.no_grad()
def test_5_patches_are_dropped_before_they_mix(vlm: VLM) -> None:
    (item,) = shown(vlm, 1)
    (view,) = views(vlm, [item], 0.7, kind="patch")
    kept = kept_tokens(16, 0.7, "record1", 0)
    assert not torch.allclose(view.tokens, item.tokens[kept], atol=1e-3)
    # What the dropped patches showed makes no difference: repaint them.
    dropped = sorted(set(range(16)) - set(kept.tolist()))
    pixels = vlm.pixel_values([item.image])
    for patch in dropped:
        row, column = divmod(patch, 4)
        pixels[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 3.0
    vision = Vision.of(vlm.model)
    columns = torch.tensor([0, *(kept + 1).tolist()])
    torch.testing.assert_close(
        vision.tokens(vision.embed(pixels)[:, columns])[0], view.tokens, atol=1e-6, rtol=0
    )


def test_5_a_crop_keeps_the_area_and_the_shape() -> None:
    image = Image.new("RGB", (400, 200))
    for rate in (0.0, 0.25, 0.7, 0.99):
        part = cropped(image, rate, "k")
        assert part.width * part.height == pytest.approx((1 - rate) * 400 * 200, rel=0.05)
        assert part.width / part.height == pytest.approx(2, rel=0.05)
    assert cropped(image, 1.0, "k").size == (1, 1)
    noisy = picture(3)
    assert cropped(noisy, 0.0, "k").tobytes() == noisy.tobytes()
    first, again, other = (cropped(noisy, 0.7, key).tobytes() for key in ("a", "a", "b"))
    assert first == again != other


def test_5_every_part_of_an_image_can_be_what_is_kept() -> None:
    ramp = Image.new("L", (10, 10))
    ramp.putdata(range(100))
    seen = {value for key in range(400) for value in cropped(ramp, 0.84, key).tobytes()}
    assert seen == set(range(100))


def test_ways_that_mean_nothing_are_refused_with_what_to_do() -> None:
    accepted = [DegradeConfig.parse(way).model_dump(exclude={"rate"}) for way in WAYS]
    choices = product(
        ("visual_token", "pixel", "patch", "latent"),
        ("delete", "zero", "attn_mask"),
        ("reindex", "keep_original"),
    )
    ways = [dict(zip(("kind", "mode", "positions"), choice, strict=True)) for choice in choices]
    refused = [way for way in ways if way not in accepted]
    assert len(refused) == len(ways) - len(accepted) == 16
    for way in refused:
        with pytest.raises(InvalidConfig, match="degrade") as error:
            DegradeConfig.parse(way)
        assert "degrade." in error.value.remedy
