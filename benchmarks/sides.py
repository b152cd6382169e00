"""The two sides of `benchmarks.training`: ours and TRL, on the same records, weights and loss."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import combinations
from typing import Any

import numpy as np
import peft
import torch
import trl.trainer.utils
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.generation import QUESTIONS, load
from hscr.config import FinetuneConfig
from hscr.learn.examples import Pair, Pictures, collate, openers, prepare
from hscr.learn.preference_trainer import PreferenceTrainer
from hscr.learn.trainer import training_arguments
from hscr.models.adapters import LORA_TARGETS
from hscr.models.attention import NAME as ROWS
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord, Response

LEVELS, TOKENS = 3, 64
PAIRS = LEVELS * (LEVELS + 1) // 2
CONFIG = FinetuneConfig(
    batch_size=1, epochs=1.0, nll_weight=0.0, pair_reduction="mean", learning_rate=1e-5, warmup_ratio=0.0
)
"""of a step on one record"""
_USE_TRITON = trl.trainer.utils._use_triton

Gradients = dict[str, Tensor]


def work(vlm: VLM, count: int) -> list[Pair]:
    """Records with four answers of 64 tokens each, end-of-sequence included."""
    random = np.random.default_rng(0)
    words = ["left", "right", "lung", "nodule", "side", "image", "organ", "clear", "upper", "lower", "stone"]
    pairs: list[Pair] = []
    for number in range(count):
        answers = [_answer(vlm, random.choice(words, TOKENS).tolist()) for _ in range(1 + LEVELS)]
        rejected = tuple(
            Response(text=text, similarity=0.9 - 0.2 * level, mean_probability=0.1)
            for level, text in enumerate(answers[1:])
        )
        record = PreferenceRecord(
            id=f"r{number:04}", image_digest=f"i{number}", study="s", question=QUESTIONS[number % 2],
            chosen=answers[0], rejected=rejected, source="s", method="hscr", model_digest="m",
            config_digest="c", consent=True,
        )  # fmt: skip
        pairs.append((record, Image.fromarray(random.integers(0, 255, (336, 336, 3), dtype=np.uint8))))
    return pairs


def _answer(vlm: VLM, words: list[str]) -> str:
    while len(vlm.completion_ids(" ".join(words))) > TOKENS:
        words = words[:-1]
    return " ".join(words)


class Ours:
    """The packed tree, its reference computed once for the epoch."""

    def __init__(self, device: str, count: int, per_step: int, stack: ExitStack) -> None:
        self._config = CONFIG.model_copy(update={"batch_size": per_step})
        self.vlm = load(device)
        self.vlm.model.set_attn_implementation({"text_config": ROWS})
        self._pairs = work(self.vlm, count)
        self._folder = stack.enter_context(tempfile.TemporaryDirectory())
        self._parameters = stack.enter_context(self.vlm.with_lora(self._config))

    def epoch(self, count: int) -> Callable[[], None]:
        """What trains on the first records once, reference included."""
        trainer, examples = self._trainer(count)

        def run() -> None:
            trainer.reference = trainer.compute_reference(examples, lambda: None)
            trainer.train()

        return run

    def first(self) -> tuple[float, Gradients]:
        """Loss and gradient on the first record, away from the reference."""
        trainer, (example,) = self._trainer(1)
        batch = collate([(example, True)])
        return measured(self._parameters, lambda: trainer.compute_loss(trainer.model, batch))

    def _trainer(self, count: int) -> tuple[PreferenceTrainer, list[Any]]:
        pairs = self._pairs[:count]
        examples = prepare(self.vlm, pairs, self._config)
        arguments = training_arguments(self.vlm, self._config, self._folder)
        pictures = Pictures(self.vlm, openers(pairs))
        trainer = PreferenceTrainer(self.vlm, examples, pictures, config=self._config, arguments=arguments)
        return trainer, examples


class Trl:
    """DPOTrainer on all six pairs of a record at once; further records of a step are accumulated."""

    def __init__(self, device: str, count: int, per_step: int, stack: ExitStack, *, compact: bool) -> None:
        vlm = load(device)
        vlm.model.set_attn_implementation("sdpa")
        self._compact, self._rows = compact, exploded(work(vlm, count))
        lora = peft.LoraConfig(r=CONFIG.rank, lora_alpha=CONFIG.alpha, target_modules=LORA_TARGETS)
        arguments = DPOConfig(
            output_dir=stack.enter_context(tempfile.TemporaryDirectory()), num_train_epochs=1,
            learning_rate=CONFIG.learning_rate,
            beta=CONFIG.gamma, loss_type=["sigmoid"], max_length=None, per_device_train_batch_size=PAIRS,
            gradient_accumulation_steps=per_step,
            gradient_checkpointing=False, disable_dropout=True,
            bf16=device == "cuda", use_cpu=device == "cpu",
            train_sampling_strategy="sequential", lr_scheduler_type="cosine", optim="adamw_torch_fused",
            dataloader_num_workers=4 if device == "cuda" else 0, dataloader_pin_memory=device == "cuda",
            report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=10**6,
        )  # fmt: skip
        self._trainer = DPOTrainer(
            vlm.model,
            args=arguments,
            train_dataset=self._rows,
            processing_class=vlm.processor,
            peft_config=lora,
        )
        self._trainer.remove_callback(PrinterCallback)

    def epoch(self, count: int) -> Callable[[], object]:
        """What trains on the first records once, reference included."""
        self._head()
        self._trainer.train_dataset = self._rows.select(range(PAIRS * count))
        return self._trainer.train

    def first(self) -> tuple[float, Gradients]:
        self._head()
        self._trainer.train_dataset = self._rows.select(range(PAIRS))
        (batch,) = self._trainer.get_train_dataloader()
        model = self._trainer.model
        return measured(dict(model.named_parameters()), lambda: self._trainer.compute_loss(model, batch))

    def _head(self) -> None:
        trl.trainer.utils._use_triton = (lambda _device: True) if self._compact else _USE_TRITON


def exploded(pairs: Sequence[Pair]) -> Dataset:
    rows = [
        {
            "images": [image],
            "prompt": [{"role": "user", "content": record.question}],
            "chosen": [{"role": "assistant", "content": better}],
            "rejected": [{"role": "assistant", "content": worse}],
        }
        for record, image in pairs
        for better, worse in combinations([record.chosen, *(each.text for each in record.rejected)], 2)
    ]
    return Dataset.from_list(rows)


def measured(parameters: dict[str, nn.Parameter], compute: Callable[[], Tensor]) -> tuple[float, Gradients]:
    """Loss and gradients at adapter weights that depend on their names alone; then they are put back."""
    named = {_plain(name): p for name, p in parameters.items() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in named.items()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(named):
            named[name].copy_(0.02 * torch.randn(named[name].shape, generator=generator))
    loss = compute()
    torch.autograd.backward(loss)
    gradients = {name: p.grad.detach().float().cpu() for name, p in named.items() if p.grad is not None}
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(before[name])
            p.grad = None
    return float(loss.detach()), gradients


def _plain(name: str) -> str:
    head, _, tail = name.removeprefix("base_model.model.").partition(".lora_")
    return f"{head}.lora_{tail[:1]}"


def differences(ours: tuple[float, Gradients], other: tuple[float, Gradients]) -> tuple[float, float]:
    """Absolute of the losses, relative norm of the gradients."""
    assert ours[1].keys() == other[1].keys()
    rows = [torch.cat([each[1][name].flatten() for name in sorted(each[1])]) for each in (ours, other)]
    return abs(ours[0] - other[0]), float((rows[0] - rows[1]).norm() / rows[1].norm())
