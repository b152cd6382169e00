"""What the benchmarks of load say of their times."""

from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies; there must be one at least."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
