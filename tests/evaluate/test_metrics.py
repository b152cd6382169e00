"""Scores: a right answer scores, a shift of prior does not, hallucinations and omissions are told apart."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from hscr.errors import InvalidInput
from hscr.evaluate.metrics import ACCURACY, HALLUCINATION, KIND, MACRO, OMISSION, PARSED, score, summarise
from hscr.evaluate.suites import Suite, SuiteItem
from hscr.models.phantom.anatomy import STUDIES
from hscr.models.phantom.language import caption, parse_answer

Answerer = Callable[[SuiteItem], str]


def scores(suite: Suite, answer: Answerer) -> dict[str, float]:
    return summarise([score(item, answer(item)) for item in suite.items])


def test_the_truth_scores_one(phantoms: Suite) -> None:
    result = scores(phantoms, lambda item: item.truth)
    assert result[MACRO] == result[ACCURACY] == result[PARSED] == 1
    assert result[HALLUCINATION] == result[OMISSION] == 0
    assert all(value == 1 for name, value in result.items() if name.startswith(KIND))


def test_gibberish_scores_nothing_and_does_not_parse(phantoms: Suite) -> None:
    result = scores(phantoms, lambda _: "purple elephants")
    assert result[MACRO] == result[ACCURACY] == result[PARSED] == result[HALLUCINATION] == 0
    assert result[OMISSION] > 0.3


def of_kind(suite: Suite, *kinds: str) -> Suite:
    return Suite("part", tuple(item for item in suite.items if item.kind in kinds))


def test_a_shift_of_prior_changes_accuracy_but_not_the_macro_score(phantoms: Suite) -> None:
    # Whoever does not look can choose any prior: each class lost is a class won.
    binary = of_kind(phantoms, "abnormal", "presence", "side", "size")
    always = [
        {"abnormal": a, "presence": a, "side": b, "size": c}
        for a, b, c in (("yes", "left", "small"), ("no", "right", "large"))
    ]
    results = [scores(binary, lambda item, prior=prior: prior[item.kind]) for prior in always]
    assert [result[MACRO] for result in results] == [0.5, 0.5]
    assert results[0][ACCURACY] != results[1][ACCURACY]


def test_a_classes_size_does_not_weigh(phantoms: Suite) -> None:
    items = of_kind(phantoms, "abnormal").items
    no = [item for item in items if item.truth_class == "no"]
    copies = tuple(replace(no[0], id=f"copy {number}") for number in range(500))
    answer: Answerer = lambda item: "Yes" if item.image_cluster != no[-1].image_cluster else "No"  # noqa: E731
    plain, skewed = scores(Suite("plain", items), answer), scores(Suite("skewed", items + copies), answer)
    assert skewed[ACCURACY] < plain[ACCURACY] - 0.3
    assert plain[MACRO] - skewed[MACRO] == pytest.approx(0.5 / len(no) - 0.5 / (len(no) + 500))


def test_captions_tell_hallucinations_from_omissions(phantoms: Suite) -> None:
    captions = of_kind(phantoms, "caption")
    ill = next(item for item in captions.items if item.phantom and item.phantom.finding)
    well = next(item for item in captions.items if item.phantom and not item.phantom.finding)
    assert ill.phantom is not None
    assert well.phantom is not None
    silent = score(ill, caption(replace(ill.phantom, finding=None, side=None, size=None, location=None)))
    assert (silent.hallucinated, silent.omitted, silent.score) == (False, True, 0)
    other = next(f for f in STUDIES[ill.phantom.study].findings if f != ill.phantom.finding)
    wrong = score(ill, caption(replace(ill.phantom, finding=other)))
    assert (wrong.hallucinated, wrong.omitted) == (True, True)
    made_up = score(well, f"There may be a {other} somewhere")
    assert (made_up.hallucinated, made_up.omitted, made_up.parsed) == (True, False, False)
    flipped = score(
        ill, caption(replace(ill.phantom, side="left" if ill.phantom.side == "right" else "right"))
    )
    assert (flipped.hallucinated, flipped.omitted, flipped.score) == (False, False, 0)


def test_answers_count_by_their_meaning(phantoms: Suite) -> None:
    item = of_kind(phantoms, "side").items[0]
    assert score(item, item.truth_class.upper()).score == 1
    assert parse_answer("side", item.truth) == item.truth_class


def test_rows_are_scored_by_llavameds_rules() -> None:
    def row(kind: str, truth: str, text: str) -> tuple[SuiteItem, str]:
        return SuiteItem(f"{kind}{truth}{text}", b"", "", "i", kind, kind, "?", truth), text

    asked = [
        row("closed", "no", "It is abnormal"),
        row("closed", "yes", "yes"),
        row("open", "left lobe", "left"),
    ]
    result = summarise([score(item, text) for item, text in asked])
    assert result["llavamed/closed_run_eval"] == 1
    assert result["closed_strict_word"] == 0.5
    assert result["llavamed/open_recall"] == 0.5
    assert HALLUCINATION not in result


def test_nothing_cannot_be_summarised() -> None:
    with pytest.raises(InvalidInput):
        summarise([])
