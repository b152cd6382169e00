"""The preference loss against independent oracles (algorithms §6: 16-18, 19-23)."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hscr.learn.losses import nll, preference_loss, reward_metrics

GAMMA = 0.3
RATIOS = torch.tensor([[0.7, -0.4, 1.1, -2.0], [0.1, 0.2, -0.3, 0.0]])
ALL = torch.ones_like(RATIOS, dtype=torch.bool)


def oracle(row: list[float], gamma: float) -> tuple[float, float]:
    """Eqs. 5 and 6 in float64, pair by pair."""

    def cost(winner: float, loser: float) -> float:
        return math.log1p(math.exp(-gamma * (winner - loser)))

    rest = list(itertools.combinations(row[1:], 2))
    return math.fsum(cost(row[0], r) for r in row[1:]), math.fsum(cost(a, b) for a, b in rest)


def total(ratios: Tensor, present: Tensor, gamma: float = GAMMA) -> Tensor:
    loss = preference_loss(ratios, present, gamma)
    return loss.explicit + loss.implicit


def test_16_one_pair_equals_the_sigmoid_loss() -> None:
    ratios = RATIOS[:, :2]
    expected = -torch.nn.functional.logsigmoid(GAMMA * (ratios[:, 0] - ratios[:, 1]).double())
    found = preference_loss(ratios, ALL[:, :2], GAMMA).explicit
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=6), st.floats(0.0625, 2, width=32))
def test_16_both_terms_equal_a_float64_oracle(row: list[float], gamma: float) -> None:
    found = preference_loss(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool), gamma)
    explicit, implicit = oracle(row, gamma)
    assert float(found.explicit) == pytest.approx(explicit, rel=1e-5, abs=1e-6)
    assert float(found.implicit) == pytest.approx(implicit, rel=1e-5, abs=1e-6)


def test_17_one_dispreferred_answer_has_no_implicit_loss() -> None:
    present = torch.tensor([[True, True, False, False]] * 2)
    assert preference_loss(RATIOS, present, GAMMA).implicit.tolist() == [0, 0]
    assert preference_loss(RATIOS[:, :2], ALL[:, :2], GAMMA).implicit.tolist() == [0, 0]


@pytest.mark.parametrize("filler", [0.0, 1e4, math.nan, math.inf])
def test_17_what_an_empty_slot_holds_is_never_read(filler: float) -> None:
    present = torch.tensor([[True, True, True, False]] * 2)
    ratios = torch.where(present, RATIOS, filler).requires_grad_()
    loss = total(ratios, present)
    torch.testing.assert_close(loss, total(RATIOS[:, :3], ALL[:, :3]))
    loss.sum().backward()
    assert ratios.grad is not None
    assert torch.isfinite(ratios.grad).all()
    assert ratios.grad[:, 3].tolist() == [0, 0]


def test_18_at_the_reference_the_loss_is_six_pairs_of_ln_2() -> None:
    ratios = torch.zeros(1, 4, requires_grad=True)
    loss = total(ratios, ALL[:1], 0.1)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(4.15888, abs=1e-5)
    assert ratios.grad is not None
    torch.testing.assert_close(ratios.grad[0], 0.05 * torch.tensor([-3.0, -1.0, 1.0, 3.0]))


def test_19_reversing_the_order_flips_the_implicit_gradient() -> None:
    def gradient(columns: list[int]) -> Tensor:
        ratios = torch.zeros(1, 4, requires_grad=True)
        preference_loss(ratios[:, columns], ALL[:1], GAMMA).implicit.sum().backward()
        assert ratios.grad is not None
        return ratios.grad

    torch.testing.assert_close(gradient([0, 1, 2, 3]), -gradient([0, 3, 2, 1]))


def test_19_permuting_equal_ratios_changes_nothing() -> None:
    ratios = torch.tensor([[0.5, 0.2, 0.2, -1.0]])
    torch.testing.assert_close(total(ratios, ALL[:1]), total(ratios[:, [0, 2, 1, 3]], ALL[:1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_21_huge_margins_stay_finite(dtype: torch.dtype) -> None:
    ratios = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    loss = total(ratios, ALL[:, :3], 1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert ratios.grad is not None
    assert torch.isfinite(ratios.grad).all()
    assert float(loss[0].detach()) > 2e4 * 0.9


def test_22_explicit_and_implicit_are_ranknet_on_the_list() -> None:
    pairs = itertools.combinations(RATIOS[0].tolist(), 2)
    expected = sum(math.log1p(math.exp(-GAMMA * (a - b))) for a, b in pairs)
    assert float(total(RATIOS, ALL)[0]) == pytest.approx(expected, abs=1e-5)


def test_nll_is_per_token() -> None:
    assert nll(torch.tensor([-6.0, -1.0]), torch.tensor([3, 2])).tolist() == [2.0, 0.5]


def test_metrics_by_hand() -> None:
    present = torch.tensor([[True, True, True, False], [True, True, False, False]])
    found = reward_metrics(RATIOS, present, 0.5)
    assert found == pytest.approx(
        {
            "rewards/chosen": 0.2,
            "logratio/chosen": 0.4,
            "rewards/rejected": 0.5 * (-0.4 + 1.1 + 0.2) / 3,
            "rewards/margins": 0.5 * (1.1 - 0.4 - 0.1) / 3,
            "rewards/accuracies": 1 / 3,
        }
    )


def test_an_equal_pair_is_not_accurate() -> None:
    assert reward_metrics(torch.zeros(1, 2), ALL[:1, :2], 1.0)["rewards/accuracies"] == 0
