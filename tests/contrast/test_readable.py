"""On the embedded model: what HSCR makes can be read, and what random substitution makes cannot."""

from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from hscr.config import GenerateConfig, SubstituteConfig
from hscr.contrast.generate import Skipped, generate
from hscr.models.phantom.anatomy import render
from hscr.models.phantom.data import TRAFFIC, Example, sample_examples
from hscr.models.phantom.language import parse_answer
from hscr.models.phantom.train import WEIGHTS
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord, PreferenceSource


@pytest.fixture(scope="module")
def vlm() -> VLM:
    torch.set_num_threads(1)
    return VLM.load(WEIGHTS)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(sample_examples(TRAFFIC, "traffic", 24, 7, 5))


def sources(examples: list[Example]) -> Iterator[tuple[PreferenceSource, Image.Image]]:
    for example in examples:
        yield (
            PreferenceSource(
                id=example.id,
                image_digest=str(example.phantom.seed),
                study="s",
                question=example.question,
                chosen=example.answer,
                consent=True,
            ),
            render(example.phantom),
        )


def readable(vlm: VLM, examples: list[Example], config: GenerateConfig) -> tuple[int, float]:
    """How many records, and the share of their dispreferred answers inside the phantom's grammar."""
    kinds = {example.id: example.kind for example in examples}
    made = [
        record for record in generate(vlm, sources(examples), config) if isinstance(record, PreferenceRecord)
    ]
    parsed = [
        parse_answer(kinds[record.source], response.text) is not None
        for record in made
        for response in record.rejected
    ]
    return len(made), sum(parsed) / len(parsed)


def test_nine_in_ten_dispreferred_answers_are_in_the_grammar(vlm: VLM, examples: list[Example]) -> None:
    records, share = readable(vlm, examples, GenerateConfig())
    assert records >= 0.3 * len(examples)
    assert share >= 0.9


def test_random_substitutes_are_not(vlm: VLM, examples: list[Example]) -> None:
    _, share = readable(vlm, examples, GenerateConfig(substitute=SubstituteConfig(negatives="random")))
    assert share < 0.5


def test_no_dispreferred_answer_says_what_the_preferred_one_says(vlm: VLM, examples: list[Example]) -> None:
    """A rewording of the truth would teach the model to doubt it."""
    kinds = {example.id: example.kind for example in examples}
    made = [r for r in generate(vlm, sources(examples), GenerateConfig()) if isinstance(r, PreferenceRecord)]
    same = [
        (record.chosen, response.text)
        for record in made
        for response in record.rejected
        if parse_answer(kinds[record.source], record.chosen)
        == parse_answer(kinds[record.source], response.text)
        and kinds[record.source] != "caption"
    ]
    assert len(same) <= 0.1 * len(made), same


def test_decoded_answers_are_the_models_own_words(vlm: VLM, examples: list[Example]) -> None:
    config = GenerateConfig.parse({"substitute": {"mode": "decoded", "beta": 0.0}})
    few = list(sources(examples))[:24]
    made = [one for one in generate(vlm, few, config) if isinstance(one, PreferenceRecord)]
    assert len(made) >= 3
    for record in made:
        for response in record.rejected:
            assert response.substitutions == ()
            ids: dict[int, int | None] = dict(enumerate(vlm.completion_ids(record.chosen)))
            ids |= {change.position: change.new_id for change in response.changes}
            assert [token for _, token in sorted(ids.items()) if token is not None] == vlm.completion_ids(
                response.text
            )
    again = [
        one for one in generate(vlm, few[::-1], config, batch_size=5) if isinstance(one, PreferenceRecord)
    ]
    texts = {one.id: [response.text for response in one.rejected] for one in again}
    assert texts == {one.id: [response.text for response in one.rejected] for one in made}


def test_a_source_that_comes_twice_gives_its_record_twice(vlm: VLM, examples: list[Example]) -> None:
    config = GenerateConfig.parse({"substitute": {"mode": "decoded", "beta": 0.0}})
    twice = [source for source in sources(examples) for _ in range(2)]
    made = list(generate(vlm, twice, config, batch_size=1))
    assert len(made) == 2 * len(examples)
    assert any(isinstance(one, PreferenceRecord) for one in made)
    for one, other in zip(made[::2], made[1::2], strict=True):
        assert _said(one) == _said(other)


def _said(outcome: PreferenceRecord | Skipped) -> object:
    return outcome.rejected if isinstance(outcome, PreferenceRecord) else outcome
