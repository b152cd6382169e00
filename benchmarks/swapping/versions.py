"""Adapters whose answers differ, and what each says to every question, computed by transformers and PEFT."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from hscr.config import FinetuneConfig
from hscr.imaging.decode import prepare
from hscr.imaging.guard import Limits
from hscr.learn.probe import probe_adapter
from hscr.models.phantom.anatomy import photograph
from hscr.models.phantom.data import TRAFFIC, Example, sample_examples
from hscr.models.vlm import VLM
from hscr.records import AdapterVersion, PreferenceRecord, Response
from hscr.store.releases import BASE, add_adapter
from hscr.store.store import Store

MAX_TOKENS = 12
_TRIED, _SCALE = 128, 0.1
_MARGIN = 0.02
"""nats between the best and the second best token: engines whose log-probs agree to 1e-3 say the same"""


class Question(NamedTuple):
    """`answers` by version name, `base` without an adapter; no two are equal."""

    image: bytes
    text: str
    answers: dict[str, str]

    def version(self, answer: str) -> str | None:
        """Which version says exactly this; None for anything else."""
        return next((name for name, said in self.answers.items() if said == answer), None)


def versions(store: Store, model: Path, folder: Path, count: int, questions: int) -> list[Question]:
    """Register `count` adapters of random weights in the store, and questions that tell all of them apart.

    Raises AssertionError when too few questions do.
    """
    vlm = VLM.load(model)
    examples = list(sample_examples(TRAFFIC, "traffic", _TRIED, 7, 1))
    names: list[str | None] = [None]
    for seed in range(count):
        made = _adapter(vlm, folder / str(seed), seed)
        names.append(_registered(store, vlm, made, examples[:4]))
    said = {name or BASE: _answers(vlm, name, examples) for name in names}
    found = [
        Question(photograph(example.phantom), example.question, {name: said[name][n] for name in said})
        for n, example in enumerate(examples)
        if all(said[name][n] for name in said) and len({said[name][n] for name in said}) == len(said)
    ]
    assert len(found) >= questions, f"only {len(found)} of {_TRIED} questions tell all versions apart"
    return found[:questions]


def _adapter(vlm: VLM, folder: Path, seed: int) -> Path:
    """Random weights, large enough to change what is said."""
    generator = torch.Generator().manual_seed(seed)
    with vlm.with_lora(FinetuneConfig(seed=seed)) as parameters:
        for parameter in parameters.values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * _SCALE)
        vlm.adapters.save("trainee", folder)
    return folder


def _registered(store: Store, vlm: VLM, folder: Path, examples: Sequence[Example]) -> str:
    """As a fine-tune would have left it; also loaded beside the others here. Gives its name."""
    digest = store.blobs.put_folder(folder)
    name = f"hscr@{digest[:12]}"
    vlm.load_adapter(folder, name)
    pairs = []
    for example in examples:
        prepared = prepare(photograph(example.phantom), limits=Limits())
        record = PreferenceRecord(
            id=f"pref_{example.id}", image_digest=store.blobs.put(prepared.png), study="bench",
            question=example.question, chosen=example.answer, source="bench", method="random",
            rejected=(Response(text="no.", similarity=0.1, mean_probability=0.1),),
            model_digest=vlm.digest, config_digest="bench", consent=True,
        )  # fmt: skip
        pairs.append((record, Image.open(io.BytesIO(prepared.png))))
    version = AdapterVersion(
        name=name, digest=digest, base_digest=vlm.digest, job_id="bench", config=FinetuneConfig().resolved(),
        records=len(pairs), records_digest="bench", probe=probe_adapter(vlm, name, pairs),
    )  # fmt: skip
    with store.database.write() as connection:
        add_adapter(connection, version, [])
    return name


def _answers(vlm: VLM, adapter: str | None, examples: Sequence[Example]) -> list[str | None]:
    """Greedy answers of at most MAX_TOKENS tokens; None where a token is chosen by less than the margin."""
    images = {example.id: _as_served(example) for example in examples}
    tokens = vlm.encode(images)
    prompts = [vlm.prompt_ids(example.question) for example in examples]
    with vlm.use(adapter), torch.inference_mode():
        context = vlm.prefill(vlm.embed(prompts, [tokens[example.id] for example in examples]))
        said = vlm.generate_greedy(context, MAX_TOKENS)
        spoken = [vlm.completion_ids(text)[:MAX_TOKENS] for text in said]
        logits = [row for (row,) in vlm.completion_logits(context, [[ids] for ids in spoken])]
    return [text if _sure(rows, ids) else None for text, rows, ids in zip(said, logits, spoken, strict=True)]


def _sure(logits: torch.Tensor, ids: Iterable[int]) -> bool:
    """Whether greedy decoding says `ids`, and with a margin at every token."""
    best = logits.topk(2).values
    return logits.argmax(-1).tolist() == list(ids) and bool((best[:, 0] - best[:, 1]).min() > _MARGIN)


def _as_served(example: Example) -> Image.Image:
    return Image.open(io.BytesIO(prepare(photograph(example.phantom), limits=Limits()).png))
