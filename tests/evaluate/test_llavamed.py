"""LLaVA-Med's VQA metrics (algorithms, test 39): the quirks are the specification."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hscr.evaluate.llavamed import closed_llavamed_run_eval, closed_strict_word, normalise, open_recall


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the left lung", "left lung"),
        ("left-sided", "left sided"),  # a mark between letters becomes a space
        ("left - sided", "left sided"),  # one that touches a space disappears
        ("left- sided x-ray", "left sided xray"),
        ("1,000 x-rays", "1000 xrays"),  # digit,digit: every mark disappears
        ("none", "0"),
        ("zero or ten", "0 or 10"),
        ("3.5 cm. end.", "3.5 cm end"),
        ("dont", "don't"),
        ("couldntve couldn'tve", "couldntve couldn't've"),
        ("an effusion, a mass", "effusion mass"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_only_32_periods_are_dropped_at_a_time() -> None:
    once = normalise("x. " * 40)
    assert once.count(".") == 8
    assert normalise(once).count(".") == 0  # not idempotent, and the recall normalises twice
    assert open_recall("x. " * 40, "x") == 1


def test_repetition_inflates_recall() -> None:
    assert open_recall("left left left lung", "left lobe") == 0.75
    assert open_recall("left", "left lobe") == 0.5
    assert open_recall("right", "left lobe") == 0
    assert open_recall("", "left") == 0
    assert open_recall("The left lobe.", "left lobe") == 1


def test_abnormal_contains_no() -> None:
    assert closed_llavamed_run_eval("It is abnormal", "no")
    assert not closed_strict_word("It is abnormal", "no")


@pytest.mark.parametrize(
    ("prediction", "reference", "compatible", "strict"),
    [
        ("Yes, there is.", "yes", True, True),
        ("No.", "Yes", False, False),
        ("yes or no", "no", True, False),
        ("left", "left", False, True),  # neither yes nor no: the compatible rule never counts it
        ("on the right side", "right side", False, True),
        ("rightmost side", "right side", False, False),
        ("", "yes", False, False),
    ],
)
def test_closed_rules(prediction: str, reference: str, compatible: bool, strict: bool) -> None:
    assert closed_llavamed_run_eval(prediction, reference) is compatible
    assert closed_strict_word(prediction, reference) is strict


@given(st.text(max_size=60), st.text(max_size=60))
def test_recall_is_a_fraction(prediction: str, reference: str) -> None:
    assert 0 <= open_recall(prediction, reference) <= 1
