"""What every user of the model relies on: prompts, masks, log-probs, decoding (algorithms §6: 6, 20)."""

from pathlib import Path

import pytest
import torch

from hscr.errors import InvalidCheckpoint, InvalidQuestion, InvalidRecord, NotFound
from hscr.models.digest import model_digest, template_digest
from hscr.models.vlm import VLM
from tests.tiny_llava import build, picture

QUESTIONS = ["is it?", "what does this image show, left or right?", "is there a nodule?"]
ANSWERS = ["yes", "no, left.", "a stone in the lung"]


@pytest.fixture(scope="module")
def visual(vlm: VLM) -> torch.Tensor:
    return vlm.visual_tokens(vlm.pixel_values([picture(i) for i in range(3)]))


def test_logprobs_equal_the_reference_implementation(vlm: VLM, visual: torch.Tensor) -> None:
    prompt, completion = vlm.prompt_ids(QUESTIONS[0]), vlm.completion_ids(ANSWERS[1])
    inputs = vlm.processor(
        text=vlm.prompt(QUESTIONS[0]), images=picture(0), return_tensors="pt", add_special_tokens=False
    )
    ids = torch.cat([inputs.input_ids, torch.tensor([completion])], dim=1)
    with torch.no_grad():
        logits = vlm.model(input_ids=ids, pixel_values=inputs.pixel_values).logits
        expected = logits.log_softmax(-1)[0, -len(completion) - 1 : -1]
        context = vlm.prefill(vlm.embed([prompt], visual[:1]))
        found = vlm.completion_logprobs(context, [[completion]])[0][0]
    torch.testing.assert_close(found, expected.gather(-1, torch.tensor(completion)[:, None])[:, 0])


@torch.no_grad()
def test_20_siblings_batch_mates_and_padding_change_nothing(vlm: VLM, visual: torch.Tensor) -> None:
    prompts = [vlm.prompt_ids(q) for q in QUESTIONS]
    views = [visual[0], visual[1][:5], visual[2][:0]]
    completions = vlm.completions_ids(ANSWERS)
    together = vlm.completion_logprobs(vlm.prefill(vlm.embed(prompts, views)), [completions] * 3)
    for row, prompt, view in zip(together, prompts, views, strict=True):
        for found, completion in zip(row, completions, strict=True):
            context = vlm.prefill(vlm.embed([prompt], [view]))
            alone = vlm.completion_logprobs(context, [[completion]])[0][0]
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_a_context_can_be_read_again(vlm: VLM, visual: torch.Tensor) -> None:
    context = vlm.prefill(vlm.embed([vlm.prompt_ids(QUESTIONS[0])], visual[:1]))
    completions = [vlm.completions_ids(ANSWERS)]
    first = vlm.completion_logprobs(context, completions)[0]
    vlm.generate_greedy(context, 6)
    second = vlm.completion_logprobs(context, completions)[0]
    assert all(map(torch.equal, first, second))


@torch.no_grad()
def test_the_image_matters(vlm: VLM, visual: torch.Tensor) -> None:
    prompt, completion = vlm.prompt_ids(QUESTIONS[0]), vlm.completion_ids(ANSWERS[0])
    contexts = [vlm.prefill(vlm.embed([prompt], visual[i : i + 1])) for i in (0, 1)]
    one, other = (vlm.completion_logprobs(context, [[completion]])[0][0] for context in contexts)
    assert not torch.allclose(one, other)


def test_6_dropping_shortens_the_prompt_after_the_projector(vlm: VLM, visual: torch.Tensor) -> None:
    assert visual.shape[1] == vlm.image_token_count == 16
    prompt = vlm.prompt_ids(QUESTIONS[0])
    prefix = vlm.embed([prompt, prompt], [visual[0], visual[0][:5]])
    assert [len(row) for row in prefix.embeds] == [len(prompt) - 1 + 16, len(prompt) - 1 + 5]
    assert prefix.ends == [len(prompt) - 1 + 16, len(prompt) - 1 + 5]
    assert prefix.positions[1].tolist() == list(range(prefix.ends[1]))


@torch.no_grad()
def test_greedy_takes_the_most_probable_token_each_time(vlm: VLM, visual: torch.Tensor) -> None:
    prompts = [vlm.prompt_ids(q) for q in QUESTIONS]
    views = [visual[0], visual[1][:5], visual[2]]
    texts = vlm.generate_greedy(vlm.prefill(vlm.embed(prompts, views)), max_tokens=6)
    for prompt, view, text in zip(prompts, views, texts, strict=True):
        ids: list[int] = []
        while len(ids) < 6 and (not ids or ids[-1] != vlm.eos_id):
            said = vlm.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
            row = torch.cat([vlm.embed([prompt], [view]).embeds[0], said])
            out = vlm.model(inputs_embeds=row[None], attention_mask=torch.ones(1, len(row)))
            ids.append(int(out.logits[0, -1].argmax()))
        assert text == vlm.text(ids)


def test_answer_tokens_continue_the_prompt(vlm: VLM) -> None:
    question = [{"type": "image"}, {"type": "text", "text": QUESTIONS[2]}]
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[2]}]},
    ]
    whole = vlm.tokenizer(vlm.processor.apply_chat_template(turns), add_special_tokens=False)["input_ids"]
    assert whole == vlm.prompt_ids(QUESTIONS[2]) + vlm.completion_ids(ANSWERS[2])
    assert vlm.text(vlm.completion_ids(ANSWERS[2])) == ANSWERS[2]


@pytest.mark.parametrize("question", ["<image>", "is </s> it", "a<s>b", "x <pad>"])
def test_user_text_is_never_control(vlm: VLM, question: str) -> None:
    with pytest.raises(InvalidQuestion, match="control tokens"):
        vlm.prompt_ids(question)


def test_control_split_over_parts_is_refused(vlm: VLM) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}]
    with pytest.raises(InvalidQuestion, match="control tokens"):
        vlm.chat_ids([{"role": "user", "content": parts}])


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(vlm: VLM, question: str) -> None:
    with pytest.raises(InvalidQuestion, match="empty"):
        vlm.prompt_ids(question)


def test_a_question_beyond_the_context_is_refused(vlm: VLM) -> None:
    with pytest.raises(InvalidQuestion, match="reads fewer than 512"):
        vlm.prompt_ids("nodule " * 600)


@pytest.mark.parametrize("answer", ["", " ", "yes</s>", "<image>"])
def test_an_unusable_answer_is_refused(vlm: VLM, answer: str) -> None:
    with pytest.raises(InvalidRecord, match="empty"):
        vlm.completion_ids(answer)


def test_digests_follow_what_can_change_an_answer(tmp_path: Path) -> None:
    folder = build(tmp_path)
    model, template = model_digest(folder), template_digest(folder)
    (folder / "README.md").write_text("a card")
    assert (model_digest(folder), template_digest(folder)) == (model, template)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + " ")
    assert model_digest(folder) != model
    assert template_digest(folder) != template
    file.unlink()
    with pytest.raises(NotFound, match="no chat template"):
        template_digest(folder)


def test_a_folder_without_a_model_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"config\.json"):
        VLM.load(tmp_path)


def test_missing_weights_are_not_invented(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = build(tmp_path) / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "projector" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(NotFound, match="projector"):
        VLM.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "holds", "why"),
    [
        ("chat_template.jinja", "", "chat template"),
        ("chat_template.jinja", "{% for %}", "chat template .*Expected an expression"),
        ("chat_template.jinja", "{{ messages[0]['role'] }}", "0 images to a question about one"),
        ("chat_template.jinja", "<image><image>", "2 images"),
        ("processor_config.json", "[]", "tokenizer or the image processor"),
        ("tokenizer_config.json", '"x"', "tokenizer or the image processor"),
    ],
)
def test_a_damaged_template_or_configuration_is_told(tmp_path: Path, file: str, holds: str, why: str) -> None:
    folder = build(tmp_path / "model")
    (folder / file).write_text(holds)
    with pytest.raises(InvalidCheckpoint, match=why) as refused:
        VLM.load(folder)
    assert "convert" in refused.value.remedy
