"""`hscr generate --out`: a data set in, a folder of preference records out. Imports torch."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import hscr
from hscr.config import GenerateConfig
from hscr.contrast.generate import check_compiled, find_embedder, generate, numeric_mode
from hscr.models.vlm import VLM
from hscr.rows.source import RowSource
from hscr.runs.finish import finish
from hscr.runs.folder import open_run
from hscr.runs.model import adapter_folder, attached, load
from hscr.runs.shards import Plan, write_missing
from hscr.runs.summary import Summary
from hscr.store.blobs import folder_digest

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RunOptions:
    """How a generation run goes about its work."""

    resume: bool = False
    """go on after the last complete shard of the run in the folder"""
    limit: int | None = None
    """the first so many rows of the input; None means all"""
    shard_size: int = 256
    """input rows per shard: what a kill can cost"""
    batch_size: int = 16
    """rows generated together"""
    device: str = "auto"
    """`auto` is CUDA where there is one"""
    dtype: str = "auto"
    """`auto` is bfloat16 on CUDA and float32 elsewhere"""
    compiled: bool = False
    """in mode `decoded`, steps through torch.compile"""


def generate_records(
    model: Path,
    rows: RowSource,
    folder: Path,
    config: GenerateConfig,
    *,
    adapter: Path | None = None,
    options: RunOptions = RunOptions(),
    on_progress: Progress = lambda _done, _total: None,
) -> Summary:
    """Make dispreferred answers for a data set and write them to `folder` as shards with a summary.

    Memory is bounded by a batch, whatever the data set's size. A run that was killed and resumed leaves the
    same rows, byte for byte, as one that was not. `on_progress(rows done, rows)` follows each row.

    Raises Conflict for a folder that holds something else or is damaged, or whose run had other settings.
    Raises before anything is written, so that the folder can be used again: NotFound or InvalidCheckpoint for
    the model, NotFound or AdapterRefused for the adapter, InvalidConfig for a mode that has nothing to
    compile, InvalidConfig or DependencyMissing for an embedder that cannot be loaded. Rows that give no
    record never raise: the folder's `skipped.jsonl` names them.
    """
    check_compiled(config, compiled=options.compiled)
    plan = Plan(rows, options.shard_size, options.limit)
    with open_run(folder, resume=options.resume) as run:
        vlm = load(model, options.device, options.dtype)
        digest = None if adapter is None else folder_digest(adapter_folder(adapter))
        embedder = find_embedder(config, vlm.device)
        with attached(vlm, adapter, f"local@{(digest or '')[:12]}") as name:
            run.begin(_identity(vlm, plan, config, digest, options), _environment())
            made = partial(
                generate, vlm, config=config, adapter=name, batch_size=options.batch_size,
                embedder=embedder, compiled=options.compiled,
            )  # fmt: skip
            write_missing(run, plan, made, on_progress)
        return finish(run)


def _identity(
    vlm: VLM, plan: Plan, config: GenerateConfig, adapter_digest: str | None, options: RunOptions
) -> dict[str, Any]:
    """All that decides which records a run makes, down to the last bit on one kind of machine."""
    return {
        "input_digest": plan.source.digest,
        "rows": plan.rows,
        "shard_size": plan.size,
        "batch_size": options.batch_size,
        "model_digest": vlm.digest,
        "template_digest": vlm.template_digest,
        "adapter_digest": adapter_digest,
        "numeric_mode": numeric_mode(vlm, compiled=options.compiled),
        "config_digest": config.digest,
        "config": config.resolved(),
    }


def _environment() -> dict[str, str]:
    return {
        "hscr": hscr.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
