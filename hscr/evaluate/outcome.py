"""What became of one question of a suite; apart, so that clients can read it without the suites."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One answer, scored. `score` is in [0, 1]: right or wrong, for an open row its recall.

    `hallucinated` and `omitted` are about captions and None for everything else: the caption names a finding
    that is not in the image; it does not name the one that is.
    """

    item_id: str
    cluster: str
    kind: str
    truth_class: str
    truth: str
    text: str
    score: float
    parsed: bool
    hallucinated: bool | None = None
    omitted: bool | None = None
