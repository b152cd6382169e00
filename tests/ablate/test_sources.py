"""What arms start from: right answers of images nobody is asked about, and wrong answers written by hand."""

import itertools
from collections import Counter

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from hscr.ablate.bench import Bench
from hscr.ablate.external import external
from hscr.ablate.setting import Setting
from hscr.ablate.sources import Asked, asked, wrong_answers
from hscr.config import GenerateConfig
from hscr.contrast.generate import Skipped
from hscr.errors import InvalidConfig
from hscr.models.phantom.data import BALANCED, Example, sample_examples
from hscr.models.phantom.language import KINDS, caption_errors, parse_answer, parse_caption
from hscr.models.vlm import VLM
from hscr.stack import PHANTOM


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(sample_examples(BALANCED, "traffic", 30, 7, len(KINDS)))


def test_a_seed_draws_its_own_questions_in_the_number_asked_for() -> None:
    setting = Setting(records=20, questions=9)
    first, again, other = (list(asked(setting, seed)) for seed in (0, 0, 1))
    assert [each.source for each in first] == [each.source for each in again]
    assert len(first) == len(other) == 20
    assert not {each.source.id for each in first} & {each.source.id for each in other}


def test_what_is_trained_on_is_not_asked_about(bench: Bench) -> None:
    trained_on = {each.source.image_digest for each in asked(bench.setting, 0)}
    assert not trained_on & {item.image_digest for item in bench.suite.items}


def test_wrong_answers_are_wrong_and_in_the_grammar(examples: list[Example]) -> None:
    for example in examples:
        texts = wrong_answers(example, 100, 0)
        assert texts
        assert len(set(texts)) == len(texts)
        for text in texts:
            value = parse_answer(example.kind, text)
            assert value is not None
            if example.kind == "caption":
                assert parse_caption(text) != parse_caption(example.answer)
            else:
                assert value != example.truth_class


def test_every_other_answer_of_a_kind_can_be_drawn(examples: list[Example]) -> None:
    counts = {kind: set[int]() for kind in KINDS}
    for example in examples:
        counts[example.kind].add(len(wrong_answers(example, 1000, 0)))
    assert counts["abnormal"] == counts["presence"] == counts["side"] == counts["size"] == {1}
    assert counts["modality"] == {3}
    assert counts["organ"] == {2}
    assert counts["location"] == {5}
    # Three or four findings and none, less the right one; captions: findings x 2 x 2 x 3 and none, less it.
    assert counts["finding"] <= {3, 4}
    assert counts["caption"] <= {36, 48}


def test_wrong_captions_hallucinate_or_omit(examples: list[Example]) -> None:
    wrong = Counter(
        caption_errors(text, example.phantom)
        for example in examples
        if example.kind == "caption" and example.phantom.finding is not None
        for text in wrong_answers(example, 1000, 0)
    )
    assert set(wrong) == {(False, False), (True, True), (False, True)}


def test_draws_depend_on_the_seed_alone(examples: list[Example]) -> None:
    captions = [example for example in examples if example.kind == "caption"]
    first, again, other = ([wrong_answers(each, 8, seed) for each in captions] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_answers_by_somebody_else_make_records_of_every_question(bench: Bench) -> None:
    sources = list(itertools.islice(asked(bench.setting, 0), 6))
    config = GenerateConfig()
    plain = LlavaForConditionalGeneration.from_pretrained(PHANTOM, dtype=torch.float32).eval()
    records = list(external(bench.vlm, sources, config))
    assert [record.source for record in records if not isinstance(record, Skipped)] == [
        each.source.id for each in sources
    ]
    for record, each in zip(records, sources, strict=True):
        assert not isinstance(record, Skipped)
        assert record.method == "external"
        similarity = [response.similarity for response in record.rejected]
        assert all(a - b >= config.rerank.gap - 1e-9 for a, b in itertools.pairwise(similarity))
        for response in record.rejected:
            assert not response.substitutions
            independent = probability(bench.vlm, plain, each, response.text)
            assert response.mean_probability == pytest.approx(independent, abs=2e-4)


def probability(vlm: VLM, plain: LlavaForConditionalGeneration, each: Asked, text: str) -> float:
    """exp(mean log p) by transformers' own forward pass."""
    prompt, answer = vlm.prompt_ids(each.source.question), vlm.completion_ids(text)
    at = prompt.index(vlm.image_token_id)
    head = prompt[:at] + [vlm.image_token_id] * vlm.image_token_count + prompt[at + 1 :]
    with torch.inference_mode():
        ids, pixels = torch.tensor([head + answer]), vlm.pixel_values([each.image])
        logits = plain(input_ids=ids, pixel_values=pixels).logits[0, len(head) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(answer)), answer].mean().exp())


def test_an_embedder_has_no_place_in_the_grammar(bench: Bench) -> None:
    config = GenerateConfig.parse({"rerank": {"similarity": "sentence_embedding"}})
    with pytest.raises(InvalidConfig, match="corley_mihalcea"):
        next(external(bench.vlm, [], config))
