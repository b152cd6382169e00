"""One LoRA fine-tune from the base model on preference records; the reference is the base model itself."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hscr.config import FinetuneConfig
from hscr.errors import InvalidConfig, InvalidInput, InvalidRecord, JobCancelled
from hscr.learn.losses import nll, preference_loss, reward_metrics
from hscr.learn.probe import probe_adapter
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord

_log = logging.getLogger(__name__)
_MAX_GRADIENT_NORM = 1.0

Metrics = dict[str, float]
Pair = tuple[PreferenceRecord, Image.Image]


@dataclass(frozen=True)
class FinetuneResult:
    """An adapter folder in PEFT's layout, and what is known of it."""

    path: Path
    metrics: Metrics
    """TRL's names, averaged over the last epoch"""
    probe: dict[str, Any]
    """what an engine that loaded the adapter must reproduce; see `probe_adapter`"""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Example:
    """A record as tokens: completions[0] is the preferred answer, then the dispreferred by similarity."""

    record: PreferenceRecord
    visual: Tensor
    prompt: list[int]
    completions: list[list[int]]


@dataclass(frozen=True)
class _Batch:
    """Reference log-probs and present slots [B, 1 + J], and token counts of the preferred answers [B]."""

    examples: list[_Example]
    reference: Tensor
    present: Tensor = field(repr=False)
    lengths: Tensor = field(repr=False)


def finetune(
    vlm: VLM,
    examples: Sequence[Pair],
    config: FinetuneConfig,
    *,
    out_dir: str | Path,
    on_progress: Callable[[int, int, Metrics], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> FinetuneResult:
    """Train an adapter and write it to `out_dir`, which holds nothing before training has ended.

    Records are taken in the order of their ids, so the result depends on the set of records, the
    configuration and the seed alone: bit for bit on one CPU with one number of threads. `sft` trains on the
    preferred answers of the same batches. `on_progress(step, steps, metrics)` follows each step, before
    which `should_stop` may raise JobCancelled. Raises InvalidRecord that names the record, InvalidConfig
    when training diverges.
    """
    prepared = _prepare(vlm, examples, config)
    steps = max(1, math.ceil(config.epochs * len(prepared) / config.batch_size))
    history: list[Metrics] = []
    with torch.random.fork_rng(devices=[]), vlm.with_lora(config) as parameters:
        torch.manual_seed(config.seed)
        reference = _reference_logps(vlm, prepared, config.batch_size, should_stop)
        optimiser = torch.optim.AdamW(
            parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _cosine(steps, config.warmup_ratio))
        for step, chosen in enumerate(_order(len(prepared), config), start=1):
            _stop(should_stop, step - 1)
            batch = _collate([prepared[i] for i in chosen], [reference[i] for i in chosen])
            metrics = _step(vlm, batch, config, optimiser, list(parameters.values()))
            schedule.step()
            history.append(metrics)
            on_progress(step, steps, metrics)
        vlm.adapters.save("trainee", out_dir)
        probe = probe_adapter(vlm, "trainee", [(e.record, e.visual) for e in prepared])
    metrics = _mean(history[-math.ceil(len(prepared) / config.batch_size) :])
    return FinetuneResult(Path(out_dir), metrics, probe, _warnings(metrics))


def _prepare(vlm: VLM, examples: Sequence[Pair], config: FinetuneConfig) -> list[_Example]:
    if not examples:
        raise InvalidRecord("There is nothing to train on.", remedy="Collect consented preferences first.")
    visual = vlm.encode({record.image_digest: image for record, image in examples})
    records = sorted((record for record, _ in examples), key=lambda record: record.id)
    return [_example(vlm, record, visual[record.image_digest], config) for record in records]


def _example(vlm: VLM, record: PreferenceRecord, visual: Tensor, config: FinetuneConfig) -> _Example:
    rejected = [] if config.objective == "sft" else [response.text for response in record.rejected]
    try:
        completions = vlm.completions_ids([record.chosen, *rejected])
        return _Example(record, visual, vlm.prompt_ids(record.question), completions)
    except InvalidInput as error:
        raise InvalidRecord(f"{record.id}: {error.detail}", remedy="Correct or delete the record.") from error


def _reference_logps(
    vlm: VLM, examples: Sequence[_Example], size: int, should_stop: Callable[[], bool]
) -> list[Tensor]:
    """Sequence log-probs [1 + J] of each example under the base model, without gradient."""
    found: list[Tensor] = []
    for start in range(0, len(examples), size):
        _stop(should_stop, 0)
        with vlm.use(None), torch.no_grad():
            found += _sequence_logps(vlm, examples[start : start + size])
    return found


def _sequence_logps(vlm: VLM, examples: Sequence[_Example]) -> list[Tensor]:
    context = vlm.prefill(vlm.embed([e.prompt for e in examples], [e.visual for e in examples]))
    logprobs = vlm.completion_logprobs(context, [e.completions for e in examples])
    return [torch.stack([tokens.sum() for tokens in row]) for row in logprobs]


def _order(count: int, config: FinetuneConfig) -> Iterator[list[int]]:
    """Indices of each step's records: fresh permutations, cut where the last, broken epoch ends."""
    generator = torch.Generator().manual_seed(config.seed)
    epochs = math.ceil(config.epochs)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    total = math.ceil(config.epochs * count)
    for start in range(0, total, config.batch_size):
        yield order[start : min(start + config.batch_size, total)].tolist()


def _collate(examples: list[_Example], reference: Sequence[Tensor]) -> _Batch:
    device = reference[0].device
    counts = torch.tensor([len(row) for row in reference], device=device)
    padded = nn.utils.rnn.pad_sequence(list(reference), batch_first=True)
    present = torch.arange(padded.shape[1], device=device) < counts[:, None]
    lengths = torch.tensor([len(e.completions[0]) for e in examples], device=device)
    return _Batch(examples, padded, present, lengths)


def _step(
    vlm: VLM,
    batch: _Batch,
    config: FinetuneConfig,
    optimiser: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
) -> Metrics:
    loss, metrics = _loss(vlm, batch, config)
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    norm = nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
    if not torch.isfinite(norm):
        raise InvalidConfig("Training diverged.", remedy="Lower learning_rate or gamma.")
    metrics |= {"grad_norm": float(norm), "learning_rate": float(optimiser.param_groups[0]["lr"])}
    optimiser.step()
    return metrics


def _loss(vlm: VLM, batch: _Batch, config: FinetuneConfig) -> tuple[Tensor, Metrics]:
    """Mean over the batch of Eq. 7, its terms weighted, plus the weighted NLL; for `sft` the NLL alone."""
    logps = nn.utils.rnn.pad_sequence(_sequence_logps(vlm, batch.examples), batch_first=True)
    ratios = logps - batch.reference
    terms = preference_loss(ratios, batch.present, config.gamma)
    explicit, implicit = terms.explicit.mean(), terms.implicit.mean()
    likelihood = nll(logps[:, 0], batch.lengths).mean()
    loss = config.explicit_weight * explicit + config.implicit_weight * implicit
    total = likelihood if config.objective == "sft" else loss + config.nll_weight * likelihood
    metrics = reward_metrics(ratios, batch.present, config.gamma) | {
        "loss": float(total.detach()),
        "loss/explicit": float(explicit.detach()),
        "loss/implicit": float(implicit.detach()),
        "loss/nll": float(likelihood.detach()),
        "logps/chosen": float(logps[:, 0].detach().mean()),
    }
    if batch.present[:, 1:].any():
        metrics["logps/rejected"] = float(logps[:, 1:].detach()[batch.present[:, 1:]].mean())
    return total, metrics


def _cosine(steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Learning-rate factor: linear warm-up, then half a cosine down to 0."""
    warmup = math.ceil(steps * warmup_ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _mean(history: Sequence[Metrics]) -> Metrics:
    names = sorted(set().union(*history))
    values = {name: [row[name] for row in history if name in row] for name in names}
    return {name: math.fsum(row) / len(row) for name, row in values.items()}


def _warnings(metrics: Metrics) -> tuple[str, ...]:
    if metrics["logratio/chosen"] >= 0:
        return ()
    message = (
        f"The preferred answers became less probable: logratio/chosen is {metrics['logratio/chosen']:.2f}. "
        "Raise nll_weight or gamma, or lower learning_rate."
    )
    _log.warning(message)
    return (message,)


def _stop(should_stop: Callable[[], bool], step: int) -> None:
    if should_stop():
        raise JobCancelled(f"Stopped after step {step}.", remedy="Submit the job again.")
