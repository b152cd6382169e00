"""The rule of adapter parity, on log-probs that are known."""

import pytest

from workers.probe import Token, find_disparity

BASE = (-0.1, -2.0, -0.5, -3.0)
ADAPTER = (-0.6, -0.4, -0.7, -0.2)


def tokens(*, scale: float = 1.0, adapter: float = 0.0, base: float = 0.0) -> list[Token]:
    """As an engine tells them that applies `scale` of the shift, with further errors in nats."""
    return [
        Token(b, a, b + sign * base, b + scale * (a - b) + sign * adapter)
        for b, a, sign in zip(BASE, ADAPTER, (1, -1, 1, -1), strict=True)
    ]


@pytest.mark.parametrize(
    "told",
    [
        tokens(),
        tokens(adapter=9e-4),
        tokens(adapter=0.03, base=0.02),
        tokens(adapter=-0.03, base=0.02),
        tokens()[:1],
    ],
    ids=["equal", "rounding", "bf16", "bf16 the other way", "one token"],
)
def test_the_trainers_shift_passes(told: list[Token]) -> None:
    assert find_disparity(told) is None


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (tokens(scale=0.0), "off by 1.3 nats"),
        (tokens(scale=0.9), "off by 0.13 nats"),
        (tokens(scale=-1.0, base=1.0), "correlates less"),
        (tokens(adapter=2e-3), "0.001 are allowed"),
        (tokens(adapter=-0.05, base=0.02), "off by 0.07 nats a token, where 0.06 are allowed"),
        (tokens(adapter=float("nan")), "off by nan"),
    ],
    ids=[
        "not applied",
        "nine tenths",
        "reversed",
        "error",
        "beyond bf16",
        "NaN",
    ],
)
def test_another_shift_is_told(told: list[Token], why: str) -> None:
    assert why in (find_disparity(told) or "")


def test_a_shift_of_another_shape_within_the_bases_own_error() -> None:
    """Where the base model itself is far off, only the correlation can tell."""
    told = [Token(-1.0, -1.0 + shift, -1.5, -1.5 - shift) for shift in (0.1, 0.2, 0.3)]
    assert find_disparity(told) == "its shift correlates less than 0.9 with the trainer's"
