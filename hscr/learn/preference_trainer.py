"""`transformers.Trainer` over preference records: its loop, checkpoints and parallelism, and our loss.

PEFT, DDP, FSDP and DeepSpeed wrap the model as they know it, because every pass goes through its own forward.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hscr.config import FinetuneConfig
from hscr.errors import InvalidConfig
from hscr.learn.examples import Example, Examples, Order, Pictures, collate
from hscr.learn.objective import objective
from hscr.learn.tally import Tally
from hscr.learn.tree import mean_logits, sequence_logps, tree_inputs
from hscr.models.vlm import VLM

Logps = dict[str, Tensor]


class PreferenceTrainer(Trainer):  # type: ignore[misc]  # transformers ships no usable types
    """Trains the active adapter of `vlm` against its base.

    A step's loss is the mean over its records, whatever their number of answers and however processes and
    micro-batches share them.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        vlm: VLM,
        examples: Sequence[Example],
        pictures: Pictures,
        *,
        config: FinetuneConfig,
        arguments: TrainingArguments,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=vlm.adapters.shell(),
            args=arguments,
            train_dataset=Examples(examples),
            data_collator=collate,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self._check_gathering()
        self.reference: Logps | None = None
        """[1 + J] by record id; None computes it at each step"""
        self.lr_scheduler: Any
        self._vlm, self._pictures, self._config = vlm, pictures, config
        self._tally = Tally()

    @property
    def sharded(self) -> bool:
        """Whether no process holds the whole model (FSDP, ZeRO-3): then only its forward may be called."""
        return bool(self.is_fsdp_enabled or self._zero_stage == 3)

    @property
    def _zero_stage(self) -> int:
        return 0 if self._deepspeed is None else int(self._deepspeed.zero_stage)

    @property
    def _deepspeed(self) -> Any:
        """accelerate's plugin; None without DeepSpeed."""
        return getattr(self.accelerator.state, "deepspeed_plugin", None)

    def _check_gathering(self) -> None:
        """Raises InvalidConfig where the trained weights could not be gathered in the end."""
        if self._zero_stage < 3:
            return
        zero = self._deepspeed.deepspeed_config["zero_optimization"]
        if zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
            raise InvalidConfig(
                "ZeRO-3 shares the weights out and is not told to gather them when they are saved.",
                remedy="Set `zero3_save_16bit_model: true` in accelerate's configuration.",
            )

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss; `num_items_in_batch` counts the step's records."""
        examples, counts = inputs["examples"], inputs["counts"]
        reference = self._reference_of(model, examples)
        logits = self._logits(model, examples)
        logps = sequence_logps(logits, examples)
        counted = [example for example, one in zip(examples, counts.tolist(), strict=True) if one]
        losses, values = objective(logps[counts], reference[counts], counted, self._config)
        self._tally.add(values | mean_logits(logits, examples, counts))
        total = counts.sum() if num_items_in_batch is None else num_items_in_batch
        # Processes' gradients are averaged, and the mean is over the records of all of them.
        loss = losses.sum() / total * self.args.world_size
        return (loss, {"logps": logps}) if return_outputs else loss

    def compute_reference(self, examples: Sequence[Example], should_stop: Callable[[], None]) -> Logps:
        """Log-probs [1 + J] by record id under the base model; each process does its share for all."""
        found: list[tuple[str, list[float]]] = []
        size, world = self.args.per_device_train_batch_size, self.args.world_size
        with self._as_base(), self.accelerator.autocast():
            for first in range(0, len(examples), size * world):
                should_stop()
                start = first + size * self.args.process_index
                # Who has none left repeats some: a pass needs all processes where none holds the whole model.
                batch = examples[start : start + size] or examples[-size:]
                rows = zip(batch, self._logps(self.model, batch), strict=True)
                found += [(e.record.id, row[: len(e.completions)].tolist()) for e, row in rows]
        return {name: torch.tensor(row) for name, row in gather_object(found)}

    def _reference_of(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        if self.reference is None:
            with self._as_base():
                return self._logps(model, examples)
        rows = [self.reference[example.record.id] for example in examples]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.args.device)

    def trained_weights(self) -> list[Tensor]:
        return [weight for weight in self._vlm.model.parameters() if weight.requires_grad]

    @contextmanager
    def _as_base(self) -> Iterator[None]:
        """Answer as the base model does, without gradients."""
        self._vlm.adapters.train_mode(False)
        with self._vlm.use(None), torch.no_grad():
            yield
        self._vlm.adapters.train_mode()

    def _logps(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        return sequence_logps(self._logits(model, examples), examples)

    def _logits(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        return model(**tree_inputs(examples, self.args.device), **self._images(examples)).logits[0]

    def _images(self, examples: Sequence[Example]) -> dict[str, Any]:
        if self.sharded:
            return {"pixel_values": self._pictures.pixels(examples)}
        features = BaseModelOutputWithPooling(pooler_output=self._pictures.tokens(examples))
        return {"mm_encoder_outputs": {"image": features}}

    # What the loop asks for

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The next step's micro-batches of this process, and how many records the step has in all."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counted = torch.stack([batch["counts"].sum() for batch in batches]).sum()
        return batches, self.accelerator.reduce(counted.to(device), "sum")

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Linear warm-up, then half a cosine. The first step learns already: a run may have only three."""
        # Unlike the trainer's own, whose first step has a rate of 0.
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, _cosine(num_training_steps, self._config.warmup_ratio)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, _inputs: dict[str, Any]) -> int:
        """0: the trainer's estimate counts `input_ids`, which a micro-batch does not carry."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's figures with TRL's names, over all its records."""
        if "loss" in logs:
            logs |= self._tally.drain(lambda sums: self.accelerator.reduce(sums, "sum"))
        super().log(logs, start_time)

    def _get_train_sampler(self, _train_dataset: Any = None) -> Order:
        seed = self._config.seed if self._config.data_seed is None else self._config.data_seed
        world, micro = self.args.world_size, self.args.per_device_train_batch_size
        share = world * micro if world > 1 else 1
        return Order(len(self.train_dataset), seed, share, lambda: int(self.state.epoch or 0))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm):
            raise diverged()
        return norm


def diverged() -> InvalidConfig:
    return InvalidConfig("Training diverged.", remedy="Lower learning_rate or gamma.")


def _cosine(steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Learning-rate factor of a step."""
    warmup = math.ceil(steps * warmup_ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor
