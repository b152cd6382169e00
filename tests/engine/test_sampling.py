"""The choice of a token against the distribution it should follow."""

import torch

from service.embedded.sampling import Sampler, best

LOGPROBS = torch.tensor([0.1, 0.4, 0.05, 0.4, 0.05]).log()


def draws(temperature: float, top_p: float, count: int = 4000) -> torch.Tensor:
    sampler = Sampler.seeded(temperature, top_p, seed=1)
    picked = torch.tensor([sampler.pick(LOGPROBS) for _ in range(count)])
    return torch.bincount(picked, minlength=5) / count


def test_greedy_takes_the_lowest_id_of_a_tie():
    assert Sampler.seeded(0.0, 1.0, seed=1).pick(LOGPROBS) == 1


def test_temperature_one_follows_the_distribution():
    assert torch.allclose(draws(1.0, 1.0), LOGPROBS.exp(), atol=0.03)


def test_temperature_sharpens():
    expected = torch.softmax(LOGPROBS / 0.5, dim=-1)
    assert torch.allclose(draws(0.5, 1.0), expected, atol=0.03)


def test_the_nucleus_holds_the_fewest_tokens_that_reach_top_p():
    seen = draws(1.0, 0.85)
    assert torch.allclose(seen, torch.tensor([1 / 9, 4 / 9, 0, 4 / 9, 0]), atol=0.03)
    assert draws(1.0, 0.3)[1] == 1


def test_an_impossible_token_is_never_drawn():
    sampler = Sampler.seeded(2.0, 1.0, seed=1)
    logprobs = torch.tensor([0.5, 0.5, 0.0]).log()
    assert {sampler.pick(logprobs) for _ in range(500)} == {0, 1}


def test_equal_seeds_draw_equally_and_none_draws_anew():
    def run(seed):
        sampler = Sampler.seeded(1.0, 1.0, seed)
        return [sampler.pick(LOGPROBS) for _ in range(50)]

    assert run(7) == run(7) != run(8)
    assert run(None) != run(None)
    assert run(-3) == run(-3)


def test_the_best_come_in_order_of_probability_and_then_id():
    assert [token for token, _ in best(LOGPROBS, 4)] == [1, 3, 0, 2]
