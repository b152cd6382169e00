"""Intervals over images and seeds, and findings, checked by hand."""

import pytest

from hscr.ablate.measures import Finding, Value, Values, difference, level, ordering
from hscr.ablate.paper import Claim
from hscr.config import GateConfig
from hscr.errors import InvalidInput

CONFIG = GateConfig(resamples=400)


def values(*numbers: float) -> Values:
    """One item per image."""
    return {f"item-{n}": Value(number, f"image-{n}") for n, number in enumerate(numbers)}


def test_a_difference_is_paired_by_seed_and_item() -> None:
    first = [values(0.9, 0.2, 0.7), values(0.4, 0.1, 0.6)]
    second = [values(0.8, 0.1, 0.6), values(0.3, 0.0, 0.5)]
    gap = difference(first, second, CONFIG)
    assert gap is not None
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.1, 0.1, 0.1))


def test_seeds_that_disagree_widen_the_interval() -> None:
    nothing = values(0, 0, 0, 0)
    gap = difference([values(1, 1, 1, 1), nothing], [nothing, nothing], CONFIG)
    assert gap is not None
    # Two draws of two seeds: both the first, both the second, or one of each.
    assert (gap.low, gap.mean, gap.high) == pytest.approx((0, 0.5, 1))
    one = difference([values(1, 1, 1, 1)], [nothing], CONFIG)
    assert one is not None
    assert (one.low, one.mean, one.high) == pytest.approx((1, 1, 1))


def test_images_that_disagree_widen_the_interval() -> None:
    gap = level([values(1, 0), values(1, 0), values(1, 0)], CONFIG)
    assert gap is not None
    assert (gap.low, gap.mean, gap.high) == pytest.approx((0, 0.5, 1))


def test_classes_weigh_alike_however_many_questions_they_have() -> None:
    yes = {f"y{n}": Value(1.0, "image", ("presence", "yes")) for n in range(9)}
    no = {"n": Value(0.0, "image", ("presence", "no"))}
    found = level([yes | no], CONFIG)
    assert found is not None
    assert found.mean == pytest.approx(0.5)


def test_only_items_that_both_have_are_compared() -> None:
    gap = difference([values(1, 1)], [{"item-0": Value(0, "image-0")}], CONFIG)
    assert gap is not None
    assert gap.mean == 1
    assert difference([values(1)], [{"other": Value(0, "image")}], CONFIG) is None
    assert level([{}], CONFIG) is None


@pytest.mark.parametrize(
    ("better", "finding"),
    [
        (values(1, 1, 1, 1, 1, 1, 0), Finding.AGREES),
        (values(0, 0, 0, 0, 0, 0, 0), Finding.NOT_DISTINGUISHABLE),
        (values(1, 0, 1, 0, 1, -1, 0), Finding.NOT_DISTINGUISHABLE),
        (values(-1, -1, -1, -1, -1, -1, 0), Finding.DISAGREES),
    ],
)
def test_a_claim_is_settled_where_the_interval_leaves_zero_out(better: Values, finding: Finding) -> None:
    arms = {"a": [better, better], "b": [values(0, 0, 0, 0, 0, 0, 0)] * 2}
    found = ordering(Claim("open", "a", "b"), arms, CONFIG)
    assert found.finding == finding
    assert found.difference.mean == pytest.approx(sum(v.value for v in better.values()) / 7)


def test_arms_without_a_common_item_cannot_be_ordered() -> None:
    with pytest.raises(InvalidInput, match="probability"):
        ordering(Claim("probability", "a", "b"), {"a": [values(1)], "b": [{}]}, CONFIG)
