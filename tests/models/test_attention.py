"""Flat passes: rows of any length and number beside one another equal each alone (algorithms §6: 11, 20)."""

from pathlib import Path

import pytest
import torch

from hscr.models.attention import Continuing, Memory
from hscr.models.language import View
from hscr.models.vlm import VLM
from tests.tiny_llava import build, picture

QUESTIONS = ["is it?", "what does this image show, left or right? " * 6, "which organ?"]
ANSWERS = ["yes", "no, left.", "a stone in the lung"]


@pytest.fixture(scope="module")
def visual(vlm: VLM) -> torch.Tensor:
    return vlm.visual_tokens(vlm.pixel_values([picture(i) for i in range(3)]))


@torch.no_grad()
def test_a_pass_of_any_rows_equals_the_models_own(vlm: VLM, visual: torch.Tensor) -> None:
    prompts = [vlm.prompt_ids(question) for question in QUESTIONS] + [vlm.prompt_ids(QUESTIONS[0])]
    views = [visual[0], visual[1], visual[2][:3], visual[0][:0]]
    read = vlm.embed(prompts, views)
    context = vlm.prefill(read)
    assert len(context.parts) > 1
    for row, embeds in enumerate(read.embeds):
        out = vlm.model(inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds)))
        torch.testing.assert_close(vlm.logits(context.last[row]), out.logits[0, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_without_completions_or_with_one_token_are_fine(vlm: VLM, visual: torch.Tensor) -> None:
    prompts = [vlm.prompt_ids(question) for question in QUESTIONS]
    context = vlm.prefill(vlm.embed(prompts, list(visual)))
    ids = vlm.completions_ids(ANSWERS)
    alone = vlm.completion_logprobs(context, [[ids[0]], [ids[1]], [ids[2]]])
    sparse = vlm.completion_logprobs(context, [[], [ids[1]], []])
    assert sparse[0] == sparse[2] == []
    torch.testing.assert_close(sparse[1][0], alone[1][0], atol=1e-6, rtol=0)
    first = vlm.completion_logprobs(context, [[y[:1]] for y in ids])
    for row, other in zip(first, alone, strict=True):
        torch.testing.assert_close(row[0], other[0][:1], atol=1e-6, rtol=0)


@torch.no_grad()
def test_positions_of_a_view_are_those_the_rotary_embedding_sees(vlm: VLM, visual: torch.Tensor) -> None:
    """Dropped tokens that keep their places equal masked ones: the model's own pass over all with a mask."""
    prompt, answer = vlm.prompt_ids(QUESTIONS[0]), vlm.completion_ids(ANSWERS[1])
    kept = torch.tensor([1, 4, 5, 11, 15])
    whole = vlm.embed([prompt], [visual[0]])
    at = prompt.index(vlm.image_token_id)
    mask = torch.ones(1, whole.ends[0] + len(answer))
    mask[0, at : at + 16] = 0
    mask[0, at + kept] = 1
    row = torch.cat([whole.embeds[0], vlm.embed_ids(torch.tensor(answer))])[None]
    positions = torch.arange(row.shape[1])[None]
    out = vlm.model(inputs_embeds=row, attention_mask=mask, position_ids=positions).logits[0]
    view = View(visual[0][kept], kept, 16)
    found = vlm.completion_logits(vlm.prefill(vlm.embed([prompt], [view])), [[answer]])[0][0]
    torch.testing.assert_close(found, out[whole.ends[0] - 1 : -1], atol=1e-5, rtol=1e-5)
    moved = View(visual[0][kept], torch.arange(5), 5)
    other = vlm.completion_logits(vlm.prefill(vlm.embed([prompt], [moved])), [[answer]])[0][0]
    assert not torch.allclose(other, found, atol=1e-3)


@torch.no_grad()
def test_stepping_equals_reading_the_whole(folder: Path, visual: torch.Tensor) -> None:
    """In fp64: forty steps of fp32 and one pass differ by up to 1.3e-5, as a machine's kernels round."""
    vlm = VLM.load(folder)
    vlm.model.double()
    prompts = [vlm.prompt_ids(question) for question in QUESTIONS]
    context = vlm.prefill(vlm.embed(prompts, list(visual.double())))
    tokens = torch.randint(4, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = vlm.completion_logits(context, [[row.tolist()] for row in tokens])
    order = [row for part in context.parts for row in part.rows]
    memories = [part.memory.copy() for part in context.parts]
    positions = torch.tensor(context.ends)[order]
    for t in range(39):
        hidden = vlm.step(memories, tokens[order, t], positions + t)
        for place, row in enumerate(order):
            found = vlm.logits(hidden[place])
            torch.testing.assert_close(found, expected[row][0][t + 1], atol=1e-6, rtol=0)
    # The context was not written to: it reads the same again.
    again = vlm.completion_logits(context, [[row.tolist()] for row in tokens])
    assert all(torch.equal(one[0], other[0]) for one, other in zip(expected, again, strict=True))


@pytest.mark.parametrize("key_heads", [4, 2], ids=["a key head each", "grouped queries"])
def test_a_compiled_step_attends_as_another(key_heads: int) -> None:
    """The graphs are ours; the code that is made of them is not, and takes long to make."""
    lengths = torch.tensor([0, 5, 7])
    earlier = [torch.randn(3, key_heads, 9, 8) for _ in range(2)]
    query, key, value = torch.randn(3, 4, 1, 8), *torch.randn(2, 3, key_heads, 1, 8)

    def step(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return Continuing(Memory([(keys, values)], lengths), 8).attend(0, query, key, value, 0.3)

    plain, compiled = ([x.clone() for x in earlier] for _ in range(2))
    with torch.inference_mode():
        found = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
        torch.testing.assert_close(found, step(*plain))
    assert all(map(torch.equal, compiled, plain)), "and remembers in the same place"


def test_memory_moves_rows_whole(vlm: VLM, visual: torch.Tensor) -> None:
    with torch.no_grad():
        context = vlm.prefill(
            vlm.embed([vlm.prompt_ids(q) for q in (QUESTIONS[0], QUESTIONS[2])], visual[:2])
        )
    (memory,) = (part.memory for part in context.parts)
    slots = Memory.blank(memory, 3, 0)
    slots.put([2, 0], memory, [0, 1])
    assert slots.lengths.tolist() == [memory.lengths[1], 0, memory.lengths[0]]
    back = slots.take([2, 0])
    assert back.lengths.tolist() == memory.lengths.tolist()
    for (k, v), (k2, v2) in zip(back.layers, memory.layers, strict=True):
        assert torch.equal(k, k2)
        assert torch.equal(v, v2)
    both = memory.joined(slots.first(1))
    assert both.lengths.tolist() == [*memory.lengths.tolist(), int(memory.lengths[1])]


def test_the_models_own_generate_still_works(tmp_path: Path) -> None:
    vlm = VLM.load(build(tmp_path, seed=3))
    inputs = vlm.processor(
        text=[vlm.prompt(q) for q in QUESTIONS[::2]],
        images=[picture(0), picture(1)],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=False,
    )
    said = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs.input_ids.shape[1] :]
    visual = vlm.visual_tokens(inputs.pixel_values)
    with torch.no_grad():
        context = vlm.prefill(vlm.embed([vlm.prompt_ids(q) for q in QUESTIONS[::2]], list(visual)))
        assert vlm.generate_greedy(context, 6) == [vlm.text(row) for row in said.tolist()]
