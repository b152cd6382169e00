"""The data set card of an export: what it is, what made it, how its trainer is told to read it."""

from collections.abc import Iterable, Iterator

from hscr.runs.canonical import Stored
from hscr.store.export.form import Form


class Contents:
    """What the records that passed through `counting` were."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.records = 0
        self.images: set[str] = set()
        self.methods: set[str] = set()
        self.models: set[str] = set()
        self.adapters: set[str] = set()
        self.configs: set[str] = set()
        self.without_consent = 0

    def counting(self, records: Iterable[Stored]) -> Iterator[Stored]:
        for stored in records:
            record = stored.record
            self.records += 1
            self.images.add(record.image_digest)
            self.methods.add(record.method)
            self.models.add(record.model_digest)
            self.adapters.add(record.adapter or "none: the base model")
            self.configs.add(record.config_digest)
            self.without_consent += not record.consent
            yield stored


def card(contents: Contents, file: str, rows: int) -> str:
    """Markdown with the hub's front matter; `datasets.load_dataset(folder)` finds `file` by it."""
    return f"""---
license: other
task_categories: [visual-question-answering]
tags: [preference, dpo, hscr, medical, research-only]
configs:
- config_name: default
  data_files: {file}
---

# HSCR preference data: {contents.form}

{_TITLES[contents.form]}

| | |
|---|---|
| records (image and prompt) | {contents.records} |
| rows | {rows} |
| images | {len(contents.images)} |
| method | {_listed(contents.methods)} |
| answering model, SHA-256 | {_listed(contents.models)} |
| adapter | {_listed(contents.adapters)} |
| configuration, SHA-256 | {_listed(contents.configs)} |
| records without recorded consent to train | {contents.without_consent} |

The dispreferred answers were made by the model itself (HSCR, arXiv 2506.00805): most visual tokens dropped,
the answer tokens that depend on them replaced. They are wrong on purpose and must never be shown as findings.

{_HOWTO[contents.form]}
## Licence and consent

**For research use only; not for clinical care or any clinical decision.** Images, questions and preferred
answers keep the licence and the consent they were collected under, which this export does not widen: check
both before you train on it or pass it on.
"""


def _listed(values: set[str]) -> str:
    return ", ".join(f"`{value}`" for value in sorted(values)) or "none"


_TITLES = {
    Form.JSONL: "One record per line with all that made it; `images/<image_digest>.png` beside it.",
    Form.PARQUET: "One record per row with all that made it and its image inside.",
    Form.TRL: "One row per preferred and dispreferred answer, for TRL's `DPOTrainer`.",
    Form.LLAMAFACTORY: "One row per preferred and dispreferred answer, for LLaMA-Factory's `stage: dpo`.",
    Form.MS_SWIFT: "One row per preferred and dispreferred answer, for `swift rlhf --rlhf_type dpo`.",
    Form.RLAIF_V: "One row per preferred and dispreferred answer, in the columns of RLAIF-V-Dataset.",
}

_HOWTO = {
    Form.JSONL: """\
`hscr finetune --records FOLDER --out adapter` trains on it.
""",
    Form.PARQUET: """\
`hscr finetune --records FOLDER --out adapter` trains on it, `datasets.load_dataset("FOLDER")` shows it.
""",
    Form.TRL: """\
```python
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

rows = load_dataset("FOLDER", split="train")
# By default TRL cuts at 1024 tokens, of which the image takes 576 in LLaVA-1.5.
options = DPOConfig("out", max_length=None)
DPOTrainer(model, args=options, train_dataset=rows, processing_class=processor).train()
```
""",
    Form.LLAMAFACTORY: """\
Set `dataset_dir: FOLDER` (images are looked up there too), `dataset: hscr`, `stage: dpo`, and a
`cutoff_len` above prompt, image tokens and answer together: longer rows are cut without an error.
""",
    Form.MS_SWIFT: """\
`swift rlhf --rlhf_type dpo --dataset train.jsonl`, started in this folder: image paths start here.
""",
    Form.RLAIF_V: """\
`RLAIFVDataset("FOLDER", reference_model=...)` first computes the log-probs (`logps`) of the model that
is to be trained, which an export does not know.
""",
}
