"""The vision tower in steps equals the tower at once."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hscr.models.vision import Vision

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def llava(layer: int | list[int], strategy: str) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, num_hidden_layers=3, image_size=32, patch_size=8),
        text_config=LlamaConfig(**shape, num_hidden_layers=1, vocab_size=32),
        image_token_id=3,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    return LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, -1, 1, [-2, -1], [1, 3]])
def test_steps_equal_the_models_own_image_features(
    layer: int | list[int], strategy: str, attention: str
) -> None:
    model = llava(layer, strategy)
    model.set_attn_implementation(attention)
    whole = torch.stack(list(model.model.get_image_features(pixel_values=PIXELS).pooler_output))
    vision = Vision.of(model)
    assert torch.equal(vision.tokens(vision.embed(PIXELS)), whole)
    everything = torch.ones(2, 17, 17, dtype=torch.bool)
    torch.testing.assert_close(vision.tokens(vision.embed(PIXELS), everything), whole, atol=1e-6, rtol=0)
    assert whole.shape[1] == 16 + vision.class_tokens


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_a_query_may_not_see_does_not_reach_it(attention: str) -> None:
    model = llava(-1, "full")
    model.set_attn_implementation(attention)
    vision = Vision.of(model)
    visible = torch.ones(2, 17, 17, dtype=torch.bool)
    visible[:, :, 5] = False
    visible[:, 5, 5] = True
    embedded = vision.embed(PIXELS)
    changed = embedded.clone()
    changed[:, 5] = -changed[:, 5]
    before, after = vision.tokens(embedded, visible), vision.tokens(changed, visible)
    others = torch.arange(17) != 5
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, 5], after[:, 5])
    assert not torch.equal(vision.tokens(embedded)[:, others], vision.tokens(changed)[:, others])


def test_a_loaded_models_visual_tokens_come_in_steps_as_well(tmp_path: Path) -> None:
    from hscr.models.vlm import VLM
    from tests.tiny_llava import build, picture

    vlm = VLM.load(build(tmp_path))
    vision = Vision.of(vlm.model)
    pixels = vlm.pixel_values([picture(1), picture(2)])
    assert torch.equal(vision.tokens(vision.embed(pixels)), vlm.visual_tokens(pixels))
