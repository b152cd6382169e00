"""TRL's own DPOTrainer on our export: it loads, it trains, and it reads the token ids that we train on."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer

from hscr.config import GenerateConfig, SubstituteConfig
from hscr.models.adapters import LORA_TARGETS
from hscr.models.vlm import VLM
from hscr.rows.source import open_rows
from hscr.runs.run import RunOptions, generate_records
from hscr.stack import PHANTOM
from hscr.store.export.form import Form
from hscr.store.export.read import read_records
from hscr.store.export.write import export
from tests.runs.conftest import write_rows
from tests.tiny_llava import build

# TRL and its kin use what other releases of them deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def rows(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    """Records made by the tiny model, exported and loaded by the folder's name alone."""
    folder = tmp_path_factory.mktemp("trl")
    config = GenerateConfig(substitute=SubstituteConfig(negatives="random"))
    source = open_rows(str(write_rows(folder / "input")))
    generate_records(tiny, source, folder / "records", config, options=RunOptions(limit=4))
    export(read_records(folder / "records"), folder / "pairs", Form.TRL)
    return datasets.load_dataset(str(folder / "pairs"), split="train", cache_dir=str(folder / "cache"))


@pytest.fixture(params=["tiny", "phantom"])
def model(request: pytest.FixtureRequest, tiny: Path) -> Path:
    return tiny if request.param == "tiny" else PHANTOM


def trainer(model: Path, rows: datasets.Dataset, out: Path) -> DPOTrainer:
    options = DPOConfig(
        str(out), max_length=None, bf16=False, use_cpu=True, max_steps=1, per_device_train_batch_size=2,
        gradient_checkpointing=False, learning_rate=1e-3, report_to="none", save_strategy="no",
    )  # fmt: skip
    return DPOTrainer(
        LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32),
        args=options,
        train_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(model),
        peft_config=LoraConfig(r=4, target_modules=LORA_TARGETS),
    )


def ours(vlm: VLM, row: dict[str, Any], answer: str) -> tuple[list[int], list[int]]:
    """Prompt, its image placeholder expanded, and completion."""
    prompt, image = vlm.prompt_ids(row["prompt"][0]["content"]), vlm.image_token_id
    at = prompt.index(image)
    expanded = [*prompt[:at], *[image] * vlm.image_token_count, *prompt[at + 1 :]]
    return expanded, vlm.completion_ids(row[answer][0]["content"])


def test_the_export_trains_one_step_on_the_ids_that_we_train_on(
    model: Path, rows: datasets.Dataset, tmp_path: Path
) -> None:
    dpo, vlm = trainer(model, rows, tmp_path), VLM.load(model)
    batch = dpo.data_collator([rows[number] for number in range(len(rows))])
    assert len(batch["input_ids"]) == 2 * len(rows) > 4
    for number, row in enumerate(rows):
        for place, answer in ((number, "chosen"), (number + len(rows), "rejected")):
            prompt, completion = ours(vlm, row, answer)
            ids, mask = batch["input_ids"][place], batch["completion_mask"][place].bool()
            assert ids[mask].tolist() == completion
            assert ids[batch["attention_mask"][place].bool()].tolist() == [*prompt, *completion]
    assert torch.isfinite(batch["pixel_values"]).all()
    before = {name: p.detach().clone() for name, p in dpo.model.named_parameters() if p.requires_grad}
    result = dpo.train()
    assert result.training_loss == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-4)
    after = dict(dpo.model.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in before.items())
