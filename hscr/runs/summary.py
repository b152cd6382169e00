"""What a run made, in numbers: counts, reasons and histograms, from its shards, in bounded memory."""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable

from pydantic import BaseModel, Field

from hscr.records import PreferenceRecord
from hscr.rows.row import Why
from hscr.runs.canonical import read_part
from hscr.runs.folder import RunFolder
from hscr.runs.produce import Skip

EXTERNAL, OWN = 0.5, 0.6
"""HSCR Fig. 1a: answers written by another model lie mostly below the first, the model's own mostly above the
second."""

_EDGES = [n / 20 for n in range(21)]


class Histogram(BaseModel):
    """Counts of values in [0, 1] in 20 equal bins, each without its upper edge except the last."""

    edges: list[float] = Field(default_factory=lambda: list(_EDGES))
    counts: list[int] = Field(default_factory=lambda: [0] * 20)
    total: float = 0.0

    def add(self, value: float) -> None:
        self.counts[min(bisect_right(self.edges, value), 20) - 1] += 1
        self.total += value

    @property
    def mean(self) -> float:
        return self.total / max(1, sum(self.counts))


class Summary(BaseModel):
    rows: int = 0
    records: int = 0
    responses: int = 0
    skipped: int = 0
    skipped_by: dict[str, int] = Field(default_factory=dict, description="reason kind -> rows")
    no_record_by: dict[str, int] = Field(default_factory=dict, description="the generator's reasons -> rows")
    levels: dict[int, int] = Field(default_factory=dict, description="responses of a record -> records")
    similarity: dict[int, Histogram] = Field(default_factory=dict, description="by level; 1 is the closest")
    probability: Histogram = Field(default_factory=Histogram)
    below_external: int = Field(default=0, description=f"responses with mean_probability < {EXTERNAL}")
    above_own: int = Field(default=0, description=f"responses with mean_probability > {OWN}")
    positions: dict[int, int] = Field(default_factory=dict, description="0-based substituted token -> times")
    records_digest: str = Field(default="", description="SHA-256 over the records in order, without dates")


def summarise(run: RunFolder) -> Summary:
    summary, digest = Summary(), hashlib.sha256()
    for part in run.parts():
        for record, _, _ in read_part(part, images=False):
            count_record(summary, record)
            digest.update(record.model_dump_json(exclude={"created_at"}).encode() + b"\n")
    count_skips(summary, run.skips())
    summary.rows = summary.records + summary.skipped
    summary.records_digest = digest.hexdigest()
    return summary


def count_record(summary: Summary, record: PreferenceRecord) -> None:
    summary.records += 1
    summary.responses += len(record.rejected)
    summary.levels[len(record.rejected)] = summary.levels.get(len(record.rejected), 0) + 1
    for level, response in enumerate(record.rejected, 1):
        summary.similarity.setdefault(level, Histogram()).add(response.similarity)
        summary.probability.add(response.mean_probability)
        summary.below_external += response.mean_probability < EXTERNAL
        summary.above_own += response.mean_probability > OWN
        for each in response.substitutions:
            summary.positions[each.position] = summary.positions.get(each.position, 0) + 1


def count_skips(summary: Summary, skips: Iterable[Skip]) -> None:
    kinds, reasons = Counter[str](), Counter[str]()
    for skip in skips:
        kinds[skip.why] += 1
        if skip.why is Why.NO_RECORD:
            reasons[skip.reason] += 1
    summary.skipped = kinds.total()
    summary.skipped_by, summary.no_record_by = dict(kinds.most_common()), dict(reasons.most_common(20))
