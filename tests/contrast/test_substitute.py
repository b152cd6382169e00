"""Positions, substitutes and edits (algorithms §6: 8-10), by hand on vocabularies of six tokens."""

import pytest
import torch

from hscr.config import GenerateConfig, SensitiveConfig, SubstituteConfig
from hscr.contrast.contrast import log_p_diff
from hscr.contrast.edit import Branches, edits
from hscr.contrast.sensitive import sensitive_positions, sensitivity
from hscr.contrast.substitute import random_substitutes, substitutes
from hscr.models.vocabulary import Vocabulary

# left, Left, right, small, ".", end
NORMAL = ("left", "left", "right", "small", ".", "")
WORDS = Vocabulary(
    NORMAL,
    torch.tensor([1, 1, 1, 1, 0, 0]).bool(),
    {"left": [0, 1], "right": [2], "small": [3], ".": [4], "": [5]},
)
LEFT, RIGHT, SMALL, STOP, END = 0, 2, 3, 4, 5
ORDERS = ["plausible", "pdiff_ascending", "weighted", "sample_pdiff"]
OPEN = {"plausibility": 0.0, "full_plausibility": 0.0}
FULL = torch.tensor([0.50, 0.10, 0.10, 0.20, 0.06, 0.04]).log()
DROPPED = torch.tensor([0.20, 0.10, 0.40, 0.10, 0.15, 0.05]).log()


def test_8_planted_differences_are_found_most_sensitive_first() -> None:
    full = torch.zeros(6, 6).log_softmax(-1)
    dropped = full.clone()
    dropped[1, LEFT] -= 2
    dropped[4, LEFT] -= 5
    scores = sensitivity(full, dropped, [LEFT] * 6, SensitiveConfig())
    eligible = torch.tensor([True] * 5 + [False])
    assert sensitive_positions(scores, eligible, SensitiveConfig(n=2)) == [4, 1]


def test_8_the_end_is_never_chosen_and_n_may_exceed_the_answer() -> None:
    scores, eligible = torch.tensor([0.1, 0.2, 9.0]), torch.tensor([True, True, False])
    assert sensitive_positions(scores, eligible, SensitiveConfig(n=10, literal_n=True)) == [1, 0]
    assert sensitive_positions(scores, eligible, SensitiveConfig(n=10)) == [1]
    assert sensitive_positions(scores, torch.zeros(3).bool(), SensitiveConfig()) == []


def test_8_ties_go_to_the_lowest_position() -> None:
    scores = torch.tensor([0.50001, 0.50002, 0.49999])
    assert sensitive_positions(scores, torch.ones(3).bool(), SensitiveConfig(literal_n=True)) == [0, 1, 2]


def test_9_plausible_takes_what_the_dropped_branch_would_say() -> None:
    # P_diff of left, right, small is .50^1.9/.20^.9, .10^1.9/.40^.9, .20^1.9/.10^.9 = 1.14, .029, .373.
    assert substitutes(LEFT, FULL, DROPPED, WORDS, SubstituteConfig(**OPEN)) == [RIGHT, SMALL]


def test_9_plausible_keeps_only_those_below_gold() -> None:
    # P_diff of "small" is .373 on the same scale: "left" (1.14) lies above, "right" and "Left" (.1) below.
    assert substitutes(SMALL, FULL, DROPPED, WORDS, SubstituteConfig(**OPEN)) == [RIGHT, 1]


def test_9_a_word_alone_has_the_best_alternative_there_is() -> None:
    """P_diff of "left" lies above that of "small", and a cut would leave nothing: a lone word has both."""
    strict = SubstituteConfig(plausibility=1.0, full_plausibility=1.0)
    assert substitutes(SMALL, FULL, DROPPED, WORDS, strict) == []
    assert substitutes(SMALL, FULL, DROPPED, WORDS, strict, alone=True) == [RIGHT, LEFT, 1]
    ids = [SMALL, STOP, END]
    branches = Branches("k", ids, FULL.expand(3, -1), DROPPED.expand(3, -1))
    made = [edit.ids for edit in edits(branches, WORDS, GenerateConfig(substitute=strict))]
    assert made == [[RIGHT, STOP, END], [LEFT, STOP, END], [1, STOP, END]]


def test_9_ascending_is_equation_4_as_printed() -> None:
    config = SubstituteConfig(order="pdiff_ascending", **OPEN)
    found = substitutes(SMALL, FULL, DROPPED, WORDS, config)
    order = log_p_diff(FULL, DROPPED, config.beta)
    assert set(found) == {0, 1, RIGHT}
    assert found == sorted(found, key=lambda token: order[token].item())
    assert found[0] == RIGHT


def test_9_top_m_is_of_the_dropped_branch() -> None:
    assert substitutes(LEFT, FULL, DROPPED, WORDS, SubstituteConfig(top_m=1, **OPEN)) == [RIGHT]


def test_9_what_either_branch_finds_implausible_is_out() -> None:
    below = SubstituteConfig(plausibility=0.5, full_plausibility=0.0)
    assert substitutes(LEFT, FULL, DROPPED, WORDS, below) == [RIGHT]
    never = SubstituteConfig(plausibility=0.0, full_plausibility=0.3)
    assert substitutes(LEFT, FULL, DROPPED, WORDS, never) == [SMALL]


@pytest.mark.parametrize(
    ("source", "kept"), [("drop", [RIGHT]), ("full", [SMALL]), ("union", [RIGHT, SMALL])]
)
def test_9_c_t_is_of_the_source(source: str, kept: list[int]) -> None:
    config = SubstituteConfig(source=source, top_m=1, **OPEN)
    assert substitutes(LEFT, FULL, DROPPED, WORDS, config) == kept
    ascending = SubstituteConfig(source=source, top_m=1, order="pdiff_ascending", **OPEN)
    # P_diff of "right" is .029, of "small" .373.
    assert substitutes(LEFT, FULL, DROPPED, WORDS, ascending) == kept


def frequencies(order: str, rank: int, draws: int, **more: object) -> torch.Tensor:
    """[V]: how often each token is the substitute of this rank for "left"."""
    config = SubstituteConfig(order=order, **OPEN, **more)
    found = [substitutes(LEFT, FULL, DROPPED, WORDS, config, "record", seed)[rank] for seed in range(draws)]
    return torch.bincount(torch.tensor(found), minlength=6) / draws


def test_9_weighted_draws_in_proportion_to_1_over_p_diff() -> None:
    # 1 / P_diff of right and small is 1 / .0287 and 1 / .3733 on one scale: .929 and .071 of their sum.
    right, small = 0.10**1.9 / 0.40**0.9, 0.20**1.9 / 0.10**0.9
    expected = (1 / right) / (1 / right + 1 / small)
    assert expected == pytest.approx(0.929, abs=1e-3)
    first, second = frequencies("weighted", 0, 1500), frequencies("weighted", 1, 1500)
    # Four standard deviations of a share of 1500 draws.
    assert float(first[RIGHT]) == pytest.approx(expected, abs=0.027)
    # Without replacement: what is not first is second, and there is no third.
    assert float(second[SMALL]) == pytest.approx(float(first[RIGHT]))
    assert len(substitutes(LEFT, FULL, DROPPED, WORDS, SubstituteConfig(order="weighted", **OPEN), 1)) == 2


def test_9_weighted_draws_from_c_t_alone() -> None:
    config = SubstituteConfig(order="weighted", top_m=1, **OPEN)
    assert {tuple(substitutes(LEFT, FULL, DROPPED, WORDS, config, key)) for key in range(30)} == {(RIGHT,)}


def test_9_sample_pdiff_draws_from_p_diff_over_all_that_is_allowed() -> None:
    right, small = 0.10**1.9 / 0.40**0.9, 0.20**1.9 / 0.10**0.9
    expected = small / (right + small)
    found = sum(frequencies("sample_pdiff", rank, 400, top_m=1) for rank in range(8)) / 8
    assert float(found[SMALL]) == pytest.approx(expected, abs=0.02)
    assert float(found[RIGHT]) == pytest.approx(1 - expected, abs=0.02)
    config = SubstituteConfig(order="sample_pdiff", candidates=5, **OPEN)
    assert len(substitutes(LEFT, FULL, DROPPED, WORDS, config, "key")) == 5


def test_9_sample_pdiff_of_nothing_allowed_is_nothing() -> None:
    lone = Vocabulary(("left", "."), torch.tensor([True, False]), {"left": [0], ".": [1]})
    even = torch.tensor([0.5, 0.5]).log()
    for order in ORDERS:
        assert substitutes(0, even, even, lone, SubstituteConfig(order=order, **OPEN), "key") == []


@pytest.mark.parametrize("order", ["weighted", "sample_pdiff"])
def test_9_draws_depend_on_their_key_alone(order: str) -> None:
    config = SubstituteConfig(order=order, **OPEN)
    drawn = [tuple(substitutes(LEFT, FULL, DROPPED, WORDS, config, "record", n, 3)) for n in range(40)]
    torch.manual_seed(5)
    again = [tuple(substitutes(LEFT, FULL, DROPPED, WORDS, config, "record", n, 3)) for n in range(40)]
    assert drawn == again
    assert len(set(drawn)) > 1


def test_9_ties_go_to_the_lower_id_whatever_the_cut() -> None:
    wide = Vocabulary.read(_Letters(), 26)
    even = torch.zeros(26).log_softmax(-1)
    for order, source in (("plausible", "drop"), ("pdiff_ascending", "full"), ("pdiff_ascending", "union")):
        config = SubstituteConfig(order=order, source=source, top_m=3, **OPEN)
        # `plausible` keeps none: nothing lies below gold's P_diff where all are equal.
        expected = [] if order == "plausible" else [0, 1, 2]
        assert substitutes(4, even, even, wide, config) == expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gold", [LEFT, RIGHT, SMALL])
def test_9_gold_its_variants_and_punctuation_never_appear(gold: int, order: str) -> None:
    found = substitutes(gold, FULL, DROPPED, WORDS, SubstituteConfig(order=order, **OPEN))
    assert not {NORMAL[token] for token in found} & {NORMAL[gold], ".", ""}


def test_9_random_substitutes_depend_on_their_key_alone() -> None:
    first = random_substitutes(LEFT, WORDS, 10, "record", 0, 3)
    assert first == random_substitutes(LEFT, WORDS, 10, "record", 0, 3)
    assert sorted(first) == [RIGHT, SMALL]


def test_9_random_substitutes_are_uniform() -> None:
    wide = Vocabulary.read(_Letters(), 26)
    drawn = [random_substitutes(0, wide, 1, "record", seed)[0] for seed in range(2500)]
    counts = torch.bincount(torch.tensor(drawn), minlength=26)
    assert counts[0] == 0
    expected = len(drawn) / 25
    # The 99.93 % quantile of chi-squared with 24 degrees of freedom.
    assert float(((counts[1:] - expected) ** 2 / expected).sum()) < 52.6


class _Letters:
    all_special_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return 26

    def decode(self, ids: list[int]) -> str:
        return chr(ord("a") + ids[0])


def _branches(rows: int) -> Branches:
    ids = [LEFT, SMALL, RIGHT, STOP, END][:rows]
    full = FULL.repeat(rows, 1)
    dropped = DROPPED.repeat(rows, 1)
    dropped[1, SMALL] -= 4  # the most sensitive word
    return Branches("record", ids, full, dropped)


@pytest.mark.parametrize("negatives", ["hscr", "random"])
def test_10_an_edit_changes_the_listed_positions_only(negatives: str) -> None:
    branches = _branches(5)
    config = GenerateConfig.parse({"substitute": {"negatives": negatives, **OPEN}})
    found = list(edits(branches, WORDS, config))
    assert found
    for edit in found:
        listed = {s.position: s.new_id for s in edit.substitutions}
        assert edit.ids == [listed.get(t, old) for t, old in enumerate(branches.ids)]
        assert all(s.old_id == branches.ids[s.position] != s.new_id for s in edit.substitutions)
        assert edit.first == min(listed)


def test_10_later_edits_of_a_rank_keep_the_most_sensitive() -> None:
    config = GenerateConfig.parse({"substitute": OPEN, "sensitive": {"literal_n": True}})
    found = list(edits(_branches(5), WORDS, config))
    assert [len(edit.substitutions) for edit in found[:2]] == [2, 1]
    assert [s.position for s in found[1].substitutions] == [1]


def test_10_the_count_varies_on_request_only() -> None:
    shared = {"sensitive": {"literal_n": True}}
    substitute = {"vary_count": False, "order": "pdiff_ascending", **OPEN}
    found = list(edits(_branches(5), WORDS, GenerateConfig.parse({"substitute": substitute, **shared})))
    # "left" has two substitutes, "small" and "right" have three.
    assert [len(edit.substitutions) for edit in found] == [3, 3, 2]


def test_nothing_to_replace_gives_no_edit() -> None:
    branches = Branches("record", [STOP, END], FULL.repeat(2, 1), DROPPED.repeat(2, 1))
    assert list(edits(branches, WORDS, GenerateConfig())) == []


def test_random_replaces_the_same_positions_as_often_by_words_the_branches_do_not_choose() -> None:
    shared = {"sensitive": {"literal_n": True}}
    hscr = GenerateConfig.parse({"substitute": OPEN, **shared})
    random = GenerateConfig.parse({"substitute": {"negatives": "random", **OPEN}, **shared})

    def chosen(config: GenerateConfig) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for edit in edits(_branches(5), WORDS, config):
            for swap in edit.substitutions:
                found.setdefault(swap.position, []).append(swap.new_id)
        return {position: list(dict.fromkeys(tokens)) for position, tokens in sorted(found.items())}

    ours, control = chosen(hscr), chosen(random)
    assert {t: len(tokens) for t, tokens in control.items()} == {t: len(tokens) for t, tokens in ours.items()}
    for t, tokens in control.items():
        gold = _branches(5).ids[t]
        assert tokens == random_substitutes(gold, WORDS, len(tokens), "record", 0, t)
