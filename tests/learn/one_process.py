"""One process of a run: `python -m torch.distributed.run … -m tests.learn.one_process MODEL OUT KIND...`.

It trains with each KIND of reference, one after another.
"""

import json
import sys
from collections.abc import Callable, Set
from functools import cache
from pathlib import Path

import torch

from hscr.config import FinetuneConfig
from hscr.models.vlm import VLM
from tests.learn.records import CONFIG, records, run

CONFIGS: dict[str, FinetuneConfig] = {
    kind: CONFIG.model_copy(
        update={"epochs": 2.0, "micro_batch_size": 1, "learning_rate": 1e-4, "reference": kind}
    )
    for kind in ("online", "cached")
}


def main(load: Callable[[str], VLM], sharded: Set[str] = frozenset()) -> None:
    """Write down what each run of a loaded model came to, and what `sharded` says after it."""
    torch.set_num_threads(1)
    model, out, *kinds = sys.argv[1:]
    for kind in kinds:
        result, history = run(load(model), CONFIGS[kind], Path(out) / kind, pairs=records(7))
        told = {
            "history": history, "metrics": result.metrics, "probe": result.probe, "sharded": sorted(sharded),
        }  # fmt: skip
        rank = torch.distributed.get_rank()
        (Path(out) / f"{kind}.{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(cache(VLM.load))
