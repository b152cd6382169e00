"""One process of a distributed run: `python -m torch.distributed.run … -m tests.learn.one_process MODEL OUT`.

It trains with an online reference, and then, in the same process, with a cached one.
"""

import json
import sys
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


def main() -> None:
    torch.set_num_threads(1)
    model, out = sys.argv[1:]
    vlm = VLM.load(model)
    for kind, config in CONFIGS.items():
        result, history = run(vlm, config, Path(out) / kind, pairs=records(7))
        told = {"history": history, "metrics": result.metrics, "probe": result.probe}
        rank = torch.distributed.get_rank()
        (Path(out) / f"{kind}.{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
