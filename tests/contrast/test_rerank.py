"""Similarity and levels (algorithms §6: 13-15)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hscr.config import RerankConfig
from hscr.contrast.rerank import corley_mihalcea, levels, similarities, token_f1

TEXT = st.text(alphabet="ab c.,", max_size=20)


@given(TEXT, TEXT)
def test_13_similarity_is_symmetric_bounded_and_one_with_itself(first: str, second: str) -> None:
    for measure in (token_f1, corley_mihalcea([first, second])):
        assert measure(first, first) == pytest.approx(1)
        assert measure(first, second) == pytest.approx(measure(second, first))
        assert 0 <= measure(first, second) <= 1 + 1e-12


def test_13_token_f1_by_hand() -> None:
    assert token_f1("a small left nodule", "a large left nodule") == pytest.approx(3 / 4)
    assert token_f1("left left lung", "left lobe") == pytest.approx(2 / 5)


def test_13_corley_mihalcea_by_hand() -> None:
    measure = corley_mihalcea(["the left", "the right"])
    # idf: the ln(3/3)+1 = 1, left and right ln(3/2)+1 = 1.405465
    assert measure("the left", "the right") == pytest.approx(1 / 2.405465, abs=1e-6)


def test_13_rare_words_weigh_more() -> None:
    measure = corley_mihalcea(["a nodule", "a mass", "a cyst"])
    assert measure("a nodule", "a") > measure("a nodule", "nodule") - 1
    assert measure("a nodule", "nodule") > measure("a nodule", "a")


@pytest.mark.parametrize(
    ("mode", "kept"), [("adjacent", [0.95, 0.84, 0.70]), ("from_preferred", [0.90, 0.84, 0.70])]
)
def test_14_gap_modes(mode: str, kept: list[float]) -> None:
    scores = [0.95, 0.90, 0.84, 0.70]
    assert [scores[i] for i in levels(scores, RerankConfig(gap_mode=mode))] == kept


@pytest.mark.parametrize("mode", ["adjacent", "from_preferred"])
def test_15_an_exact_gap_is_accepted(mode: str) -> None:
    scores = [0.9, 0.9 - 0.1, 0.7000000000000001]
    assert levels(scores, RerankConfig(gap_mode=mode)) == [0, 1, 2]


def test_levels_are_ordered_and_at_most_j() -> None:
    scores = [0.1, 0.9, 0.5, 0.3, 0.7]
    assert levels(scores, RerankConfig(levels=3)) == [1, 4, 2]
    assert levels([], RerankConfig()) == []


def test_a_records_levels_depend_on_its_own_texts_alone() -> None:
    config = RerankConfig()
    first = similarities("the left lung", ["the right lung", "the left kidney"], config)
    similarities("something else", ["the left", "the right"], config)
    assert first == similarities("the left lung", ["the right lung", "the left kidney"], config)
