"""Sensitivity scores and the positions they choose (algorithms §6: 8)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hscr.config import SensitiveConfig
from hscr.contrast.sensitive import eligible_positions, jensen_shannon, sensitive_positions, sensitivity

SCORES = ["gold_logprob_abs", "gold_abs", "max_abs", "js"]
# Two positions, three tokens; the answer says 0 and then 1.
FULL = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
DROPPED = torch.tensor([[1.0, 0.0, 3.0], [0.0, 1.0, 0.0]])


def score(name: str, full: torch.Tensor = FULL, dropped: torch.Tensor = DROPPED) -> torch.Tensor:
    return sensitivity(full, dropped, [0, 1], SensitiveConfig.parse({"score": name}))


def test_8_each_score_by_hand() -> None:
    exponentials = [math.exp(2) + 2, math.exp(1) + 1 + math.exp(3)]
    p = [math.exp(2) / exponentials[0], 1 / exponentials[0], 1 / exponentials[0]]
    q = [math.exp(1) / exponentials[1], 1 / exponentials[1], math.exp(3) / exponentials[1]]
    assert score("gold_abs").tolist() == [1.0, 0.0]
    assert score("max_abs").tolist() == [3.0, 0.0]
    expected = abs(math.log(p[0]) - math.log(q[0]))
    assert score("gold_logprob_abs").tolist() == pytest.approx([expected, 0.0], abs=1e-6)
    divergence = sum(
        a * math.log(2 * a / (a + b)) / 2 + b * math.log(2 * b / (a + b)) / 2
        for a, b in zip(p, q, strict=True)
    )
    assert score("js").tolist() == pytest.approx([divergence, 0.0], abs=1e-6)


@pytest.mark.parametrize("name", SCORES)
def test_8_planted_differences_are_found_by_every_score(name: str) -> None:
    full = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    dropped = full.clone()
    ids = list(range(12))
    dropped[3, 3] -= 6
    dropped[7, 7] -= 3
    config = SensitiveConfig.parse({"score": name, "n": 2})
    scores = sensitivity(full, dropped, ids, config)
    assert sorted(sensitive_positions(scores, torch.ones(12).bool(), config)) == [3, 7]


@pytest.mark.parametrize(("name", "moved"), zip(SCORES, [False, True, True, False], strict=True))
def test_8_constants_on_a_row_change_raw_scores_only(name: str, moved: bool) -> None:
    assert torch.allclose(score(name), score(name, FULL + 7, DROPPED - 2), atol=1e-5) is not moved


@given(
    st.lists(st.floats(-30, 30), min_size=3, max_size=3), st.lists(st.floats(-30, 30), min_size=3, max_size=3)
)
def test_8_jensen_shannon_is_symmetric_and_at_most_ln_2(first: list[float], second: list[float]) -> None:
    p, q = (torch.tensor(values).log_softmax(-1) for values in (first, second))
    found = float(jensen_shannon(p, q))
    assert 0 <= found <= math.log(2) + 1e-5
    assert found == pytest.approx(float(jensen_shannon(q, p)), abs=1e-6)


def test_8_punctuation_is_eligible_on_request_and_the_end_never() -> None:
    word, comma, end = 0, 1, 2
    content = torch.tensor([True, False, False])
    ids = [word, comma, word, end]
    assert eligible_positions(ids, content, SensitiveConfig()).tolist() == [True, False, True, False]
    free = SensitiveConfig(content_only=False)
    assert eligible_positions(ids, content, free).tolist() == [True, True, True, False]
    # A word as the last token is as much the end: what follows y_w is not y_w's.
    assert not eligible_positions([word], content, free).any()
