"""The phantoms, their language and their splits; nothing here loads torch."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hscr.models.phantom.anatomy import (
    IMAGE_SIZE,
    LOCATIONS,
    SIDES,
    SIZES,
    STUDIES,
    Phantom,
    draw,
    render,
)
from hscr.models.phantom.data import (
    BALANCED,
    MIXES,
    PRIOR,
    SPLITS,
    TRAFFIC,
    TRAINING,
    sample_examples,
    seed_range,
)
from hscr.models.phantom.language import (
    KINDS,
    NEEDS_FINDING,
    NORMAL,
    QUESTIONS,
    CaptionFacts,
    answer,
    caption,
    caption_errors,
    parse_answer,
    parse_caption,
    question,
    truth,
)

STUDY_NAMES = st.sampled_from(sorted(STUDIES))


@st.composite
def phantoms(draw_from: st.DrawFn) -> Phantom:
    study = STUDIES[draw_from(STUDY_NAMES)]
    seed = draw_from(st.integers(0, 2**34 - 1))
    if draw_from(st.booleans()):
        return Phantom(seed, study.name)
    choices = (study.findings, SIDES, SIZES, LOCATIONS[study.organ])
    return Phantom(seed, study.name, *(draw_from(st.sampled_from(choice)) for choice in choices))


def test_the_same_phantom_is_the_same_picture_and_another_seed_is_not() -> None:
    phantom = Phantom(7, "brain MR", "tumor", "left", "small", "frontal")
    assert render(phantom).tobytes() == render(replace(phantom)).tobytes()
    assert render(phantom).tobytes() != render(replace(phantom, seed=8)).tobytes()
    assert render(phantom).size == (IMAGE_SIZE, IMAGE_SIZE)
    assert render(phantom).mode == "L"


@given(phantoms())
def test_the_lesion_lies_where_the_facts_say(phantom: Phantom) -> None:
    pixels, opacity = draw(phantom)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    if phantom.finding is None:
        assert not opacity.any()
        return
    rows, columns = np.nonzero(opacity > 0.3)
    assert phantom.side == ("left" if columns.mean() > IMAGE_SIZE / 2 else "right")
    band = LOCATIONS[STUDIES[phantom.study].organ].index(str(phantom.location))
    assert abs(rows.mean() / IMAGE_SIZE - (0.3, 0.5, 0.7)[band]) < 0.14


def test_large_lesions_are_larger_than_small_ones() -> None:
    for study in STUDIES.values():
        for finding in study.findings:
            place = LOCATIONS[study.organ][1]
            small, large = (
                max(
                    draw(Phantom(seed, study.name, finding, "left", size, place))[1].sum()
                    for seed in range(5)
                )
                for size in SIZES
            )
            assert large > 1.8 * small, (study.name, finding)


def test_a_phantom_with_contradicting_facts_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown study"):
        Phantom(0, "knee MR")
    with pytest.raises(ValueError, match="no finding of a head CT"):
        Phantom(0, "head CT", "stone", "left", "small", "frontal")
    with pytest.raises(ValueError, match="choose one of each"):
        Phantom(0, "head CT", "tumor")


@given(phantoms(), st.sampled_from(KINDS), st.integers(0, 3), st.data())
def test_every_answer_parses_to_the_truth(
    phantom: Phantom, kind: str, paraphrase: int, data: st.DataObject
) -> None:
    if kind in NEEDS_FINDING and phantom.finding is None:
        with pytest.raises(ValueError, match="needs a phantom with a finding"):
            truth(kind, phantom)
        return
    asked = (
        data.draw(st.sampled_from(STUDIES[phantom.study].findings), label="asked")
        if kind == "presence"
        else None
    )
    text = answer(kind, phantom, asked)
    assert parse_answer(kind, text) == truth(kind, phantom, asked)
    assert parse_answer(kind, text.upper().removesuffix(".") + " ") == truth(kind, phantom, asked)
    assert question(kind, paraphrase, asked).endswith(("?", "."))
    assert "{" not in question(kind, paraphrase, asked)


@given(phantoms())
def test_every_caption_parses_to_its_facts_and_is_free_of_errors(phantom: Phantom) -> None:
    assert parse_caption(caption(phantom)) == CaptionFacts.of(phantom)
    assert caption_errors(caption(phantom), phantom) == (False, False)


def test_hallucinated_and_omitted_findings_are_told_apart() -> None:
    tumor = Phantom(0, "brain MR", "tumor", "left", "small", "frontal")
    infarct, normal = replace(tumor, finding="infarct"), Phantom(0, "brain MR")
    assert caption_errors(caption(tumor), infarct) == (True, True)
    assert caption_errors(caption(tumor), normal) == (True, False)
    assert caption_errors(caption(normal), tumor) == (False, True)
    assert caption_errors("tumor tumor infarct", tumor) == (True, False)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("abnormal", "Yes, there is a nodule."),
        ("presence", "No, this study is normal."),
        ("presence", "there is a nodule"),
        ("side", "It is on the large side."),
        ("side", "It is on the left right side."),
        ("location", "It is in the left."),
        ("size", ""),
        ("finding", "There is a left."),
        ("caption", "Head CT with a large stone in the left."),
    ],
)
def test_what_is_not_in_the_grammar_does_not_parse(kind: str, text: str) -> None:
    assert parse_answer(kind, text) is None


def test_the_first_word_answers_a_closed_question() -> None:
    assert parse_answer("abnormal", "Yes, this study is normal.") == "yes"
    assert parse_answer("presence", "No, there is a nodule.") == "no"


def test_bare_facts_parse() -> None:
    assert parse_answer("side", "left") == "left"
    assert parse_answer("finding", "an infarct") == "infarct"
    assert parse_answer("finding", "normal") == NORMAL
    assert parse_answer("modality", "ct") == "CT"
    assert parse_answer("location", "the Right Upper zone") == "right upper"


def test_splits_share_no_image() -> None:
    ranges = sorted((seed_range(split) for split in SPLITS), key=lambda seeds: seeds.start)
    assert all(first.stop <= second.start for first, second in pairwise(ranges))
    for mix in MIXES.values():
        for split in SPLITS:
            examples = list(sample_examples(mix, split, 50, seed=3, questions_per_image=2))
            assert all(example.phantom.seed in seed_range(split) for example in examples)
            assert len({example.phantom.seed for example in examples}) == 50


def test_sampling_is_a_function_of_its_arguments() -> None:
    first = list(sample_examples(TRAFFIC, "traffic", 30, 1, 4))
    assert first == list(sample_examples(TRAFFIC, "traffic", 30, 1, 4))
    assert first != list(sample_examples(TRAFFIC, "traffic", 30, 2, 4))
    assert len({example.id for example in first}) == len(first)


def test_every_kind_is_asked_once_about_each_abnormal_image() -> None:
    examples = list(sample_examples(BALANCED, "development", 100, 0, len(KINDS)))
    kinds = Counter((example.phantom.seed, example.kind) for example in examples)
    assert set(kinds.values()) == {1}
    abnormal = {example.phantom.seed for example in examples if example.phantom.finding}
    assert all((seed, kind) in kinds for seed in abnormal for kind in KINDS)
    assert {example.kind for example in examples} == set(QUESTIONS)


def test_traffic_lies_between_training_and_balance() -> None:
    def dominant_sides(mix: str) -> float:
        examples = [
            example
            for example in sample_examples(MIXES[mix], "train", 1500, 0, len(KINDS))
            if example.kind == "side"
        ]
        return sum(PRIOR[e.phantom.study].side == e.truth_class for e in examples) / len(examples)

    balanced, traffic, training = (dominant_sides(mix) for mix in ("balanced", "traffic", "training"))
    assert abs(balanced - 0.5) < 0.05
    assert traffic - balanced > 0.1
    assert training - traffic > 0.1
    assert TRAINING.normal < TRAFFIC.normal < BALANCED.normal


def test_the_phantoms_need_no_torch() -> None:
    names = ("anatomy", "language", "data")
    code = "; ".join(f"import hscr.models.phantom.{name}" for name in names)
    script = f"import sys; {code}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
