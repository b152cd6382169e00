"""The paper's numbers, and the orderings they amount to."""

from hscr.ablate.paper import Claim, Mixed, statements
from hscr.ablate.suites import SUITES, SuiteName


def test_a_claim_holds_on_every_data_set_of_the_paper() -> None:
    claims, mixed = statements(SUITES[SuiteName.LEVELS])
    assert claims == [
        Claim("open", "explicit", "base"),
        Claim("open", "implicit", "base"),
        Claim("open", "hscr", "base"),
        Claim("open", "implicit", "explicit"),
        Claim("open", "hscr", "explicit"),
        Claim("open", "hscr", "implicit"),
        Claim("closed", "explicit", "base"),
        Claim("closed", "implicit", "base"),
        Claim("closed", "hscr", "base"),
        Claim("closed", "hscr", "explicit"),
        Claim("closed", "hscr", "implicit"),
    ]
    # "On RAD closed explicit beats implicit", and nowhere else.
    assert mixed == [Mixed("closed", ("explicit", "implicit"), ("VQA-RAD",))]


def test_pairs_written_by_another_model_lose_to_the_base_on_open_questions_of_two_sets() -> None:
    claims, mixed = statements(SUITES[SuiteName.SOURCE])
    assert mixed == [Mixed("open", ("base", "external"), ("SLAKE", "PathVQA"))]
    assert Claim("probability", "hscr", "external") in claims
    assert Claim("open", "hscr", "external") in claims
    assert not [claim for claim in claims if "random" in claim]


def test_the_method_is_best_in_every_table() -> None:
    for suite in SUITES.values():
        claims, mixed = statements(suite)
        assert not [claim for claim in claims if claim.worse == "hscr"]
        assert not [each for each in mixed if "hscr" in each.arms]


def test_what_is_dropped_has_an_order_among_the_others() -> None:
    claims, mixed = statements(SUITES[SuiteName.MASK])
    assert Claim("closed", "latent", "patch") in claims
    assert Mixed("open", ("patch", "latent"), ("VQA-RAD",)) in mixed
