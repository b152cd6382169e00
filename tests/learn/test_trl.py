"""Loss and gradient equal those of TRL's DPOTrainer on all pairs of each record (algorithms §6: 16)."""

from itertools import combinations
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer

from hscr.config import FinetuneConfig
from hscr.learn.examples import Pictures, collate, openers, prepare
from hscr.learn.preference_trainer import PreferenceTrainer
from hscr.learn.trainer import training_arguments
from hscr.models.adapters import LORA_TARGETS
from hscr.models.vlm import VLM
from hscr.records import Response
from tests.learn.records import records

CONFIG = FinetuneConfig(rank=4, gamma=0.3, nll_weight=0.0, pair_reduction="mean", reference="online")
ANSWERS = ["yes, there is a small nodule", "yes, a stone", "no effusion in the left lung", "which organ?"]


def pairs(levels: int) -> list[Any]:
    """Three records with as many dispreferred answers."""
    rejected = tuple(
        Response(text=text, similarity=0.9 - 0.2 * i, mean_probability=0.1)
        for i, text in enumerate(ANSWERS[1 : 1 + levels])
    )
    return [
        (r.model_copy(update={"chosen": ANSWERS[0], "rejected": rejected}), image) for r, image in records(3)
    ]


def randomise(parameters: dict[str, nn.Parameter]) -> None:
    """Not at the reference, where A has no gradient and every pair costs the same."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, value in sorted(parameters.items()):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)


def plain(name: str) -> str:
    """A LoRA parameter's name without the adapter's, and without what wraps the model."""
    head, _, tail = name.removeprefix("base_model.model.").partition(".lora_")
    return f"{head}.lora_{tail[0]}"


def ours(vlm: VLM, levels: int, out: Path) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    with vlm.with_lora(CONFIG) as parameters:
        randomise({plain(name): p for name, p in parameters.items()})
        examples = prepare(vlm, pairs(levels), CONFIG)
        trainer = PreferenceTrainer(
            vlm, examples, Pictures(vlm, openers(pairs(levels))),
            config=CONFIG, arguments=training_arguments(vlm, CONFIG, out),
        )  # fmt: skip
        loss = trainer.compute_loss(trainer.model, collate([(e, True) for e in examples]))
        loss.backward()
        gradients = {plain(name): p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        logs = {"loss": 0.0}
        trainer.log(logs)
    return float(loss.detach()), gradients, logs


def trls(folder: Path, levels: int, out: Path) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    rows = [
        {
            "images": [image],
            "prompt": [{"role": "user", "content": record.question}],
            "chosen": [{"role": "assistant", "content": better}],
            "rejected": [{"role": "assistant", "content": worse}],
        }
        for record, image in pairs(levels)
        for better, worse in combinations([record.chosen, *(r.text for r in record.rejected)], 2)
    ]
    trainer = DPOTrainer(
        LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(out), beta=CONFIG.gamma, loss_type=["sigmoid"], max_length=None,
            per_device_train_batch_size=len(rows), gradient_checkpointing=False, bf16=False, use_cpu=True,
            report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(folder),
        peft_config=peft.LoraConfig(
            r=CONFIG.rank, lora_alpha=CONFIG.alpha, lora_dropout=0.0, target_modules=LORA_TARGETS
        ),
    )  # fmt: skip
    parameters = {plain(n): p for n, p in trainer.model.named_parameters() if p.requires_grad}
    randomise(parameters)
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return float(loss.detach()), {n: p.grad for n, p in parameters.items() if p.grad is not None}, metrics


@pytest.mark.filterwarnings("ignore")  # TRL's and its dependencies' own
@pytest.mark.parametrize("levels", [1, 3])
def test_16_loss_and_gradient_equal_trls(vlm: VLM, folder: Path, tmp_path: Path, levels: int) -> None:
    loss, gradients, logs = ours(vlm, levels, tmp_path)
    expected, others, metrics = trls(folder, levels, tmp_path)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert gradients.keys() == others.keys()
    assert len(gradients) == 28
    flat = torch.cat([gradients[name].flatten() for name in sorted(gradients)])
    reference = torch.cat([others[name].flatten() for name in sorted(others)])
    assert reference.norm() > 1e-2
    assert float((flat - reference).norm() / reference.norm()) < 1e-4
    if levels == 1:
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
                     "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"):  # fmt: skip
            assert logs[name] == pytest.approx(metrics[name], abs=1e-4), name
