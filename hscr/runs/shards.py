"""A data set's rows in shards of a fixed number of input rows.

Generation starts anew at each shard, so which rows share a batch, and with it every last bit of a record,
does not depend on where a run was interrupted.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from hscr.parquet import write_table
from hscr.rows.source import RowSource
from hscr.runs.canonical import CREATED, SCHEMA, SCHEMA_VERSION, VERSION, Stored, to_row
from hscr.runs.folder import SKIPS, RunFolder
from hscr.runs.produce import Generate, Numbered, Told, produce


@dataclass(frozen=True)
class Plan:
    """Which rows of the input are meant, and how many make a shard."""

    source: RowSource
    size: int
    limit: int | None = None

    @property
    def rows(self) -> int:
        return self.source.count if self.limit is None else min(self.limit, self.source.count)

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / self.size)

    def read(self, first: int) -> Iterator[Numbered]:
        """Numbered rows from number `first` on."""
        return islice(enumerate(self.source.read()), first, self.rows)


def write_missing(
    run: RunFolder, plan: Plan, generate: Generate, on_progress: Callable[[int, int], None]
) -> None:
    """Write the shards that are not there yet, in order; `on_progress(rows, of)` follows each row."""
    told, first = run.told(), len(run.parts())
    if first < plan.shards:
        run.save({"finished_at": None})  # of a finished run that lost shards, too
    rows = plan.read(first * plan.size)
    on_progress(min(first * plan.size, plan.rows), plan.rows)

    def on_row(row: int) -> None:
        on_progress(row + 1, plan.rows)

    for shard in range(first, plan.shards):
        told.skips = []
        made = produce(islice(rows, plan.size), generate, told, on_row)
        _write(run, shard, made, told)
        on_progress(min((shard + 1) * plan.size, plan.rows), plan.rows)


def _write(run: RunFolder, shard: int, made: Iterator[Stored], told: Told) -> None:
    def metadata() -> dict[str, str]:
        skips = sorted(told.skips, key=lambda skip: skip.row)
        return {
            VERSION: SCHEMA_VERSION,
            CREATED: run.started_at.isoformat(),
            "hscr.shard": str(shard),
            "hscr.identity": json.dumps(run.about["identity"]),
            SKIPS: json.dumps([skip.model_dump(mode="json") for skip in skips], ensure_ascii=False),
        }

    write_table(run.part(shard), SCHEMA, map(to_row, made), metadata)
