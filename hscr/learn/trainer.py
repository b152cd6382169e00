"""One LoRA fine-tune from the base model on preference records; the reference is the base model itself."""

import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainingArguments

from hscr import __version__
from hscr.config import FinetuneConfig
from hscr.errors import Conflict, InvalidConfig
from hscr.learn.callbacks import Follow, Metrics, Tracker, step_metrics, stop_if, trackers
from hscr.learn.checkpoints import Checkpoints, step_of
from hscr.learn.examples import Example, Pair, Pictures, digest, openers, prepare
from hscr.learn.preference_trainer import Logps, PreferenceTrainer, diverged
from hscr.learn.probe import probe_adapter
from hscr.learn.reference import read_reference, reference_file, write_reference
from hscr.models.vlm import VLM

__all__ = ["FinetuneResult", "Metrics", "finetune"]

_log = logging.getLogger(__name__)
_TRAINEE = "trainee"
_CODE = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class FinetuneResult:
    """An adapter folder in PEFT's layout, and what is known of it."""

    path: Path
    metrics: Metrics
    """TRL's names, averaged over the last epoch"""
    probe: dict[str, Any]
    """what an engine that loaded the adapter must reproduce; see `probe_adapter`"""
    warnings: tuple[str, ...]


def finetune(
    vlm: VLM,
    examples: Sequence[Pair],
    config: FinetuneConfig,
    *,
    out_dir: str | Path,
    on_progress: Callable[[int, int, Metrics], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint_every: int = 0,
    checkpoint_dir: str | Path | None = None,
    should_checkpoint: Callable[[], bool] = lambda: False,
    on_checkpoint: Callable[[], None] = lambda: None,
    resume: bool = False,
    on_resumed: Callable[[int], None] = lambda _: None,
    on_refused: Callable[[str], None] | None = None,
    report_to: Sequence[Tracker] = (),
    cache_dir: str | Path | None = None,
) -> FinetuneResult:
    """Train an adapter and write it to `out_dir`, which holds nothing before training has ended.

    Records are taken in the order of their ids, so the result depends on the set of records, the
    configuration and the seeds alone: bit for bit on one CPU with one number of threads. `sft` trains on the
    preferred answers of the same batches. `on_progress(step, steps, metrics)` follows each step, before
    which `should_stop` may raise JobCancelled.

    Every `checkpoint_every` steps (0: never), and after a step at whose end `should_checkpoint`, a checkpoint
    is written to `<out_dir>.checkpoints`, which is removed when training has ended, or to `checkpoint_dir`,
    which stays; `on_checkpoint` is called when one is whole. `resume` continues from it to the very bytes
    that an uninterrupted run gives, and tells `on_resumed` the step. With `on_refused` one that cannot be
    used is no error: it is told why, and training starts anew. `report_to` sends the metrics to TensorBoard
    (`<out_dir>.runs`) or MLflow.
    The reference's log-probs are kept in `cache_dir` for later runs.

    Under `accelerate launch` every process calls this with a model of its own, and the first one writes.
    Raises InvalidRecord that names the record, InvalidConfig when training diverges, Conflict when the
    checkpoint to resume from is damaged or another run's, DependencyMissing.
    """
    out, prepared = Path(out_dir), prepare(vlm, examples, config)
    kept = Path(checkpoint_dir) if checkpoint_dir is not None else checkpoints_beside(out)
    wanted = should_checkpoint if checkpoint_every else lambda: False
    checkpoints = Checkpoints(kept, _identity(vlm, prepared, config), wanted, on_checkpoint)
    # Asked to stop just after a step had ended without one, it is the next step's end that brings it.
    stop = lambda: should_stop() and not checkpoints.behind  # noqa: E731
    latest = _latest(checkpoints, on_refused) if resume else None
    with (
        _own_randomness(),
        vlm.with_lora(config, _TRAINEE),
        trackers(report_to, _beside(out, "runs")) as reports,
        tempfile.TemporaryDirectory() as unused,
    ):
        folder = checkpoints.aside if checkpoint_every else unused
        trainer = PreferenceTrainer(
            vlm,
            prepared,
            Pictures(vlm, openers(examples)),
            config=config,
            arguments=training_arguments(vlm, config, folder, checkpoint_every),
            callbacks=[Follow(on_progress, stop), checkpoints, *reports],
        )
        if config.reference == "cached":
            file = reference_file(Path(cache_dir), vlm, prepared) if cache_dir is not None else None
            trainer.reference = _reference(trainer, prepared, file, lambda: stop_if(should_stop, 0))
        if checkpoint_every and latest is None and trainer.is_world_process_zero():
            checkpoints.begin()
        if latest is not None:
            on_resumed(step_of(latest))
        trainer.train(resume_from_checkpoint=latest and str(latest))
        probe = _save(vlm, trainer, out, examples)
        trainer.accelerator.wait_for_everyone()
        if checkpoint_dir is None and trainer.is_world_process_zero():
            checkpoints.discard()
    metrics = _last_epoch(trainer.state.log_history, math.ceil(len(prepared) / config.batch_size))
    return FinetuneResult(out, metrics, probe, (*_fallen(metrics), *_foreign(vlm, prepared)))


def checkpoints_beside(out: Path) -> Path:
    """Where a run that writes its adapter to `out` keeps its checkpoint by default."""
    return _beside(out, "checkpoints")


def training_arguments(
    vlm: VLM, config: FinetuneConfig, folder: str | Path, checkpoint_every: int = 0
) -> TrainingArguments:
    """The configuration in transformers' terms. Raises InvalidConfig for a batch that cannot be shared."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_gradient_norm,
        activation_checkpointing=config.gradient_checkpointing,
        bf16=vlm.model.dtype == torch.bfloat16,
        use_cpu=vlm.device.type == "cpu",
        ddp_find_unused_parameters=False,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if checkpoint_every else "no",
        save_steps=checkpoint_every or 1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # One process trains on one device; further ones of the machine are other processes'.
    arguments._n_gpu = min(1, arguments.n_gpu)
    _share(arguments, config)
    return arguments


def _share(arguments: TrainingArguments, config: FinetuneConfig) -> None:
    """Divide a step's records into micro-batches of the processes."""
    world = arguments.world_size
    micro = config.micro_batch_size or max(1, config.batch_size // world)
    if config.batch_size % (micro * world):
        raise InvalidConfig(
            f"batch_size: {config.batch_size} is no multiple of {micro} records in {world} processes.",
            remedy="Set batch_size to a multiple of micro_batch_size times the number of processes.",
        )
    arguments.per_device_train_batch_size = micro
    arguments.gradient_accumulation_steps = config.batch_size // (micro * world)


def _reference(
    trainer: PreferenceTrainer, examples: Sequence[Example], file: Path | None, check: Callable[[], None]
) -> Logps:
    """From the file, or computed and written to it; by all processes alike, wherever each has its disk."""
    known = read_reference(file, examples) if file is not None and file.is_file() else {}
    if not all(gather_object([bool(known)])):
        known = trainer.compute_reference(examples, check)
        if file is not None and trainer.is_local_process_zero():
            write_reference(file, known)
    return known


def _save(vlm: VLM, trainer: PreferenceTrainer, out: Path, examples: Sequence[Pair]) -> dict[str, Any]:
    """Write the adapter. A model that no process holds whole cannot be probed here, and has no items.

    Raises InvalidConfig when the last step, which no gradient follows, made a weight NaN or infinite.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.sharded else None
    if trainer.is_world_process_zero():
        weights = state.values() if state else trainer.trained_weights()
        if not all(torch.isfinite(weight).all() for weight in weights):
            raise diverged()
        vlm.adapters.save(_TRAINEE, out, state)
    return {"items": []} if trainer.sharded else probe_adapter(vlm, _TRAINEE, examples)


def _latest(checkpoints: Checkpoints, on_refused: Callable[[str], None] | None) -> Path | None:
    try:
        return checkpoints.latest()
    except Conflict as refused:
        if on_refused is None:
            raise
        on_refused(refused.detail)
        return None


def _identity(vlm: VLM, examples: Sequence[Example], config: FinetuneConfig) -> dict[str, str]:
    return {
        "model": vlm.digest,
        "chat template": vlm.template_digest,
        "numeric mode": vlm.numeric_mode,
        "configuration": config.digest,
        "records": digest(examples),
        "code": ", ".join([f"hscr {__version__}", *(f"{name} {version(name)}" for name in _CODE)]),
    }


def _beside(out: Path, what: str) -> Path:
    out = out.resolve()
    return out.with_name(f"{out.name}.{what}")


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leave the caller's random states as they were; the trainer seeds and uses all of them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _last_epoch(history: Sequence[Metrics], steps: int) -> Metrics:
    rows = [step_metrics(logs) for logs in history if "loss" in logs][-steps:]
    names = sorted(set().union(*rows))
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: math.fsum(row) / len(row) for name, row in values.items()}


def _fallen(metrics: Metrics) -> tuple[str, ...]:
    if round(metrics["logratio/chosen"], 2) >= 0:  # what rounding alone makes is no fall
        return ()
    message = (
        f"The preferred answers became less probable: logratio/chosen is {metrics['logratio/chosen']:.2f}. "
        "Raise nll_weight or gamma, or lower learning_rate."
    )
    _log.warning(message)
    return (message,)


def _foreign(vlm: VLM, examples: Sequence[Example]) -> tuple[str, ...]:
    others = sum(example.record.model_digest != vlm.digest for example in examples)
    if not others:
        return ()
    message = (
        f"{others} of {len(examples)} records were made with another model. "
        "The methods learn from a model's own mistakes: make records with this one."
    )
    _log.warning(message)
    return (message,)
