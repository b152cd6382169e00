"""One pass over prompts, images and all their answers equals a pass for each (algorithms §6: 20)."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from hscr.config import FinetuneConfig
from hscr.errors import InvalidConfig, InvalidRecord
from hscr.learn.examples import Example, Pictures, openers, prepare
from hscr.learn.tree import answer_tokens, sequence_logps, tree_inputs
from hscr.models.attention import NAME
from hscr.models.vlm import VLM
from tests.learn.records import CONFIG, record, records
from tests.tiny_llava import picture


def examples(vlm: VLM, count: int = 4, config: FinetuneConfig = CONFIG) -> list[Example]:
    return prepare(vlm, records(count), config)


def packed(vlm: VLM, chosen: list[Example]) -> tuple[Tensor, Tensor]:
    """Log-probs [B, 1 + J] by one tree pass, and its logits [1, M, V]."""
    pixels = Pictures(vlm, openers(records(8))).pixels(chosen)
    with torch.no_grad():
        logits = vlm.model(**tree_inputs(chosen, vlm.device), pixel_values=pixels).logits
        return sequence_logps(logits[0], chosen), logits


def one_row(vlm: VLM, example: Example, answer: list[int], pad_left: int = 0) -> float:
    """A forward of one prompt and one answer by transformers alone, without our attention."""
    ids = torch.tensor([[vlm.tokenizer.pad_token_id] * pad_left + example.prompt + answer])
    mask = torch.ones_like(ids)
    mask[:, :pad_left] = 0
    vlm.model.set_attn_implementation({"text_config": "eager"})
    try:
        pixels = Pictures(vlm, openers(records(8))).pixels([example])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = vlm.model(
                input_ids=ids, pixel_values=pixels, attention_mask=mask, position_ids=positions
            ).logits[0]
    finally:
        vlm.model.set_attn_implementation({"text_config": NAME})
    rows = logits[-len(answer) - 1 : -1].float().log_softmax(-1)
    return float(rows.gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("pad_left", [0, 5])
def test_20_the_tree_equals_one_row_per_answer_wherever_it_is_padded(vlm: VLM, pad_left: int) -> None:
    batch = examples(vlm)
    found, _ = packed(vlm, batch)
    for row, example in zip(found, batch, strict=True):
        expected = [one_row(vlm, example, answer, pad_left) for answer in example.completions]
        assert row[: len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
        assert row[len(expected) :].eq(0).all()


def test_20_batch_mates_and_their_order_change_nothing(vlm: VLM) -> None:
    batch = examples(vlm, 8)
    together, _ = packed(vlm, batch)
    backwards, _ = packed(vlm, batch[::-1])
    torch.testing.assert_close(backwards.flip(0), together, atol=1e-5, rtol=0)
    for row, example in zip(together, batch, strict=True):
        alone, _ = packed(vlm, [example])
        torch.testing.assert_close(row[: alone.shape[1]], alone[0], atol=1e-5, rtol=0)


def test_an_answer_does_not_see_its_siblings(vlm: VLM) -> None:
    (whole,) = examples(vlm, 3)[2:]
    found, _ = packed(vlm, [whole])
    for index, answer in enumerate(whole.completions):
        alone, _ = packed(vlm, [Example(whole.record, whole.prompt, [answer])])
        assert float(found[0, index]) == pytest.approx(float(alone[0, 0]), abs=1e-5)


def test_only_states_that_predict_an_answer_reach_the_head(vlm: VLM) -> None:
    batch = examples(vlm)
    seen: list[int] = []
    hook = vlm.model.lm_head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].numel()))
    _, logits = packed(vlm, batch)
    hook.remove()
    count = len(answer_tokens(batch))
    assert logits.shape[:2] == (1, count)
    assert seen == [count * vlm.model.config.text_config.hidden_size]
    inputs = tree_inputs(batch, vlm.device)
    assert inputs["input_ids"].shape[1] > 4 * count


def test_one_token_answers_need_no_branches(vlm: VLM) -> None:
    short = [Example(e.record, e.prompt, [answer[:1] for answer in e.completions]) for e in examples(vlm)]
    found, _ = packed(vlm, short)
    assert float(found[2, 0]) == pytest.approx(one_row(vlm, short[2], short[2].completions[0]), abs=1e-5)


def test_rows_are_normalised_some_at_a_time_to_the_same_gradient(vlm: VLM) -> None:
    batch = examples(vlm)
    _, logits = packed(vlm, batch)

    def gradient(rows: int) -> Tensor:
        leaf = logits[0].clone().requires_grad_()
        sequence_logps(leaf, batch, rows * logits.shape[-1]).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient(3), gradient(1000))


def test_other_pixels_are_other_log_probs(vlm: VLM) -> None:
    (example,) = examples(vlm, 1)

    def logps(seed: int) -> Tensor:
        pixels = vlm.pixel_values([picture(seed)])
        with torch.no_grad():
            return sequence_logps(
                vlm.model(**tree_inputs([example], vlm.device), pixel_values=pixels).logits[0], [example]
            )

    assert (logps(0) - logps(1)).abs().max() > 1e-3


def test_a_prompt_begins_its_prompt_and_answer(vlm: VLM) -> None:
    """The template's boundary: what is trained on is what the whole conversation tokenises to."""
    for example in examples(vlm, 8):
        turns = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": example.record.question}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": example.record.chosen}]},
        ]
        text = vlm.processor.apply_chat_template(turns)
        image = "<image>" * vlm.image_token_count
        ids = vlm.tokenizer(text.replace("<image>", image), add_special_tokens=False)["input_ids"]
        assert ids == example.prompt + example.completions[0]


def test_an_image_is_never_cut_short(vlm: VLM) -> None:
    lengths = [len(e.prompt) + max(map(len, e.completions)) for e in examples(vlm)]
    longest = max(lengths)
    fitting = CONFIG.model_copy(update={"max_length": longest})
    assert [e.prompt.count(vlm.image_token_id) for e in examples(vlm, 4, fitting)] == [16] * 4
    too_short = CONFIG.model_copy(update={"max_length": longest - 1})
    with pytest.raises(InvalidRecord, match=rf"pref_{lengths.index(longest)}: .* {longest} tokens"):
        examples(vlm, 4, too_short)


def test_the_models_context_is_the_longest_length(vlm: VLM) -> None:
    with pytest.raises(InvalidConfig, match="context of 512"):
        examples(vlm, 4, CONFIG.model_copy(update={"max_length": 513}))
    endless = record(0).model_copy(update={"chosen": "left lung " * 250})
    with pytest.raises(InvalidRecord, match="pref_0"):
        prepare(vlm, [(endless, picture(0))], CONFIG)


def test_images_are_opened_when_needed_and_kept_within_bounds(vlm: VLM) -> None:
    opened: list[str] = []

    def opener(name: str, seed: int) -> object:
        return lambda: (opened.append(name), picture(seed))[1]

    pairs = [(r, opener(r.image_digest, i // 2)) for i, (r, _) in enumerate(records(6))]
    batch = prepare(vlm, pairs, CONFIG)
    assert opened == []
    one = vlm.encode({"x": picture(0)})["x"].nbytes
    pictures = Pictures(vlm, openers(pairs), limit=one)
    first = pictures.tokens(batch)
    again = pictures.tokens(batch)
    assert opened == ["image0", "image1", "image2", "image1", "image2"]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    expected = vlm.visual_tokens(vlm.pixel_values([picture(2)]))[0]
    torch.testing.assert_close(first[-1], expected)


def test_an_unreadable_image_fails_by_itself(vlm: VLM, tmp_path: Path) -> None:
    pairs = [(r, lambda: Image.open(tmp_path / "absent.png")) for r, _ in records(1)]
    with pytest.raises(FileNotFoundError, match="absent"):
        Pictures(vlm, openers(pairs)).tokens(prepare(vlm, pairs, CONFIG))
