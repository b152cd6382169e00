"""The preference loss against independent oracles (algorithms §6: 16-19, 21-23)."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hscr.config import FinetuneConfig
from hscr.learn.examples import Example
from hscr.learn.losses import nll, preference_loss, reward_values
from hscr.learn.objective import objective
from hscr.learn.tally import Tally
from tests.learn.records import record

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


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_23_the_mean_is_the_sum_over_the_number_of_pairs(levels: int) -> None:
    present = torch.arange(4) <= torch.tensor([[levels], [3]])
    added = preference_loss(RATIOS, present, GAMMA)
    mean = preference_loss(RATIOS, present, GAMMA, reduction="mean")
    pairs = torch.tensor([levels * (levels + 1) / 2, 6.0])
    torch.testing.assert_close(mean.explicit * pairs, added.explicit)
    torch.testing.assert_close(mean.implicit * pairs, added.implicit)


def test_23_a_record_without_pairs_costs_nothing() -> None:
    loss = preference_loss(RATIOS[:, :1], ALL[:, :1], GAMMA, reduction="mean")
    assert loss.explicit.tolist() == loss.implicit.tolist() == [0, 0]


def test_a_detached_winner_is_never_raised() -> None:
    def gradient(*, detach_winner: bool) -> Tensor:
        ratios = RATIOS[:1].clone().requires_grad_()
        loss = preference_loss(ratios, ALL[:1], GAMMA, detach_winner=detach_winner)
        (loss.explicit + loss.implicit).sum().backward()
        assert ratios.grad is not None
        return ratios.grad[0]

    free, detached = gradient(detach_winner=False), gradient(detach_winner=True)
    torch.testing.assert_close(detached[0], free[0])  # Eq. 5 still raises the preferred answer
    assert detached[0] < 0
    assert (detached[1:] > 0).all()
    assert free[1] < detached[1]
    assert float(total(RATIOS, ALL)[0]) == float(
        sum(preference_loss(RATIOS, ALL, GAMMA, detach_winner=True))[0]
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_record_costs_its_weighted_terms(reduction: str) -> None:
    """Two records, of three answers and of two, against float64 arithmetic pair by pair."""
    config = FinetuneConfig(
        gamma=GAMMA, explicit_weight=0.5, implicit_weight=2.0, nll_weight=3.0, pair_reduction=reduction
    )
    examples = [
        Example(record(2), [], [[5, 6, 7], [5], [6], [7, 8]]),
        Example(record(3), [], [[5, 6], [5]]),
    ]
    logps = torch.tensor([[-3.0, -1.0, -2.0, -5.0], [-4.0, -2.5, math.nan, math.nan]])
    reference = torch.tensor([[-3.5, -0.5, -2.0, -4.0], [-4.5, -1.5, 0.0, 0.0]])
    losses, values = objective(logps, reference, examples, config)
    ratios = (logps - reference).tolist()
    for index, (row, pairs, length) in enumerate([(ratios[0], 6, 3), (ratios[1][:2], 1, 2)]):
        explicit, implicit = oracle(row, GAMMA)
        share = 1 if reduction == "sum" else pairs
        expected = (0.5 * explicit + 2 * implicit) / share + 3 * -float(logps[index, 0]) / length
        assert float(losses[index]) == pytest.approx(expected, abs=1e-5)
    assert values["logps/rejected"].tolist() == [-1, -2, -5, -2.5]
    sft, _ = objective(logps, reference, examples, config.model_copy(update={"objective": "sft"}))
    assert sft.tolist() == [1, 2]


def test_a_tally_averages_over_everything_seen() -> None:
    tally = Tally()
    tally.add({"a": torch.tensor([1.0, 2.0]), "b": torch.empty(0)})
    tally.add({"a": torch.tensor([6.0]), "b": torch.empty(0)})
    assert tally.drain(lambda sums: sums) == {"a": 3.0}
    tally.add({"a": torch.tensor([5.0])})
    assert tally.drain(lambda sums: 2 * sums) == {"a": 5.0}  # as if another process had seen the same
    assert tally.drain(lambda sums: sums) == {}


def test_nll_is_per_token() -> None:
    assert nll(torch.tensor([-6.0, -1.0]), torch.tensor([3, 2])).tolist() == [2.0, 0.5]


def means(ratios: Tensor, present: Tensor, gamma: float) -> dict[str, float]:
    return {name: float(each.mean()) for name, each in reward_values(ratios, present, gamma).items()}


def test_metrics_by_hand() -> None:
    present = torch.tensor([[True, True, True, False], [True, True, False, False]])
    assert means(RATIOS, present, 0.5) == pytest.approx(
        {
            "rewards/chosen": 0.2,
            "logratio/chosen": 0.4,
            "rewards/rejected": 0.5 * (-0.4 + 1.1 + 0.2) / 3,
            "rewards/margins": 0.5 * (1.1 - 0.4 - 0.1) / 3,
            "rewards/accuracies": 1 / 3,
        }
    )


def test_an_equal_pair_is_not_accurate() -> None:
    assert means(torch.zeros(1, 2), ALL[:1, :2], 1.0)["rewards/accuracies"] == 0
