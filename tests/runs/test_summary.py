"""The numbers and the page of a run, against counts made here by hand."""

import pytest

from hscr.records import PreferenceRecord, Response, Substitution
from hscr.rows.row import Why
from hscr.runs.produce import Skip
from hscr.runs.summary import Histogram, Summary, count_record, count_skips


def response(similarity: float, probability: float, *positions: int) -> Response:
    made = (
        Substitution(position=p, old_id=1, new_id=2, sensitivity=0.1, contrast_probability=0.2)
        for p in positions
    )
    return Response(
        text="text", similarity=similarity, mean_probability=probability, substitutions=tuple(made)
    )


def record(*rejected: Response) -> PreferenceRecord:
    return PreferenceRecord(
        id="r", image_digest="a", study="s", question="q", chosen="c", rejected=rejected, source="x",
        method="hscr", model_digest="m", config_digest="d", consent=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "place"), [(0.0, 0), (0.05, 1), (0.049, 0), (0.5, 10), (0.6, 12), (0.999, 19), (1.0, 19)]
)
def test_a_value_falls_into_the_bin_whose_lower_edge_it_reaches(value: float, place: int) -> None:
    histogram = Histogram()
    histogram.add(value)
    assert histogram.counts[place] == 1
    assert sum(histogram.counts) == 1


def test_counts_by_hand() -> None:
    summary = Summary()
    count_record(summary, record(response(0.9, 0.7, 0, 2), response(0.7, 0.4, 2)))
    count_record(summary, record(response(0.8, 0.55, 1)))
    assert (summary.records, summary.responses) == (2, 3)
    assert summary.levels == {2: 1, 1: 1}
    assert summary.positions == {0: 1, 2: 2, 1: 1}
    assert (summary.below_external, summary.above_own) == (1, 1)
    assert summary.similarity[1].mean == pytest.approx(0.85)
    assert summary.similarity[2].mean == pytest.approx(0.7)
    assert (
        summary.probability.counts[8] == summary.probability.counts[11] == summary.probability.counts[14] == 1
    )


def test_skips_are_counted_by_kind_and_the_generator_s_by_reason() -> None:
    summary = Summary()
    kinds = [Why.NO_RECORD, Why.NO_RECORD, Why.TEXT_ONLY]
    count_skips(summary, (Skip(row=0, place="p", id=None, why=why, reason=f"{why}.") for why in kinds))
    assert summary.skipped == 3
    assert summary.skipped_by == {"no-record": 2, "text-only": 1}
    assert summary.no_record_by == {"no-record.": 2}
