"""A report shows what was measured, and says what was not."""

import io

from rich.console import Console

from hscr.evaluate.report import markdown, rendered
from hscr.records import Evaluation, GateVerdict, Interval

EVALUATION = Evaluation(
    candidate="demo@0123456789ab",
    active=None,
    suite="phantom/test/120/0",
    questions=1000,
    images=120,
    scores={
        "base": {
            "macro_score": 0.711,
            "macro_score_dropped": 0.5,
            "macro_score_blank": 0.3,
            "kind/side": 0.6,
        },
        "demo@0123456789ab": {
            "macro_score": 0.777,
            "hallucination_rate": 0.2,
            "omission_rate": 0.1,
            "extra": 1,
        },
    },
    differences={"macro_score": Interval(mean=0.066, low=0.021, high=0.109)},
    verdict=GateVerdict.INCONCLUSIVE,
    reasons=("visual_dependence was not measured, so harm cannot be ruled out.",),
)


def text() -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(rendered(EVALUATION))
    return console.file.getvalue()


def test_the_table_has_every_metric_once_and_dashes_for_what_is_missing() -> None:
    shown = text()
    for words in ("full image", "dropped", "blank", "side", "hallucinated", "omitted", "extra"):
        assert sum(words in line for line in shown.splitlines()) == 1, words
    row = next(line for line in shown.splitlines() if "full image" in line)
    assert "0.711" in row
    assert "0.777" in row
    assert "+0.066 [+0.021, +0.109]" in row
    assert "–" in next(line for line in shown.splitlines() if "omitted" in line)


def test_the_verdict_and_every_reason_are_shown() -> None:
    for shown in (text(), markdown(EVALUATION)):
        assert "Gate: inconclusive" in shown
        assert EVALUATION.reasons[0] in shown
        assert (
            "demo@0123456789ab against base on phantom/test/120/0 (1000 questions about 120 images)" in shown
        )


def test_markdown_is_a_well_formed_table() -> None:
    rows = [line for line in markdown(EVALUATION).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[0] == "| metric | base | demo@0123456789ab | difference |"
    assert "Research use only" in markdown(EVALUATION)
