"""The arms: one set of records a seed, and what each way of training takes of it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from hscr.ablate.bench import Bench, Progress
from hscr.ablate.external import mean_probabilities
from hscr.ablate.results import Made
from hscr.ablate.sources import Asked, pictured
from hscr.ablate.suites import BASE, HSCR, Arm
from hscr.answers import greedy, open_png
from hscr.config import EvaluateConfig, GenerateConfig
from hscr.contrast.degrade import degrade
from hscr.contrast.rerank import similarities, words
from hscr.demo.ward import is_right, traffic
from hscr.models.language import View
from hscr.models.phantom.language import parse_answer
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord, Response

RANDOM, DPO = "random", "dpo"
ARMS = (
    BASE,
    Arm("sft", "SFT", {"finetune.objective": "sft"}),
    Arm(RANDOM, "random negatives"),
    Arm(DPO, "DPO"),
    Arm("explicit", "explicit only", {"finetune.implicit_weight": 0.0}),
    Arm("implicit", "implicit only", {"finetune.explicit_weight": 0.0}),
    Arm(HSCR, "HSCR"),
)
ALIKE = "Kept HSCR's negatives: all questions of the kind have one answer."
VIEWS = ("dropped", "blank", "swapped")
ONLINE = "traffic"
"""The mix of the online setting, whose right answers come from judging the base model's."""
_QUESTIONS = 5
"""per image of the ward, as in the demo"""
_BATCH = 32


@dataclass
class AlignBench(Bench):
    """Arms that share a seed's records: the same questions and preferred answers, in the same order."""

    def identity(self, arm: Arm, seed: int) -> dict[str, Any]:
        return {**super().identity(arm, seed), "benchmark": "align", "negatives": _negatives(arm)}

    def _made_by(self, arm: Arm, config: GenerateConfig, seed: int) -> dict[str, Any]:
        return {**super()._made_by(arm, config, seed), "benchmark": "align"}

    def _sources(self, seed: int) -> list[Asked]:
        """Paper: true answers. Online: what the base answers right as it says it, the rest corrected."""
        if self.setting.mix != ONLINE:
            return super()._sources(seed)
        examples = traffic(-(-self.setting.records // _QUESTIONS), _QUESTIONS, seed)
        asked = list(pictured(examples))[: self.setting.records]
        said: list[str] = []
        for start in range(0, len(asked), _BATCH):
            batch = asked[start : start + _BATCH]
            pictures = {each.source.image_digest: each.image for each in batch}
            questions = [(each.source.question, each.source.image_digest) for each in batch]
            said += greedy(self.vlm, questions, pictures, None)
        return [judged(each, text) for each, text in zip(asked, said, strict=True)]

    def _made(
        self, arm: Arm, config: GenerateConfig, seed: int, sources: Sequence[Asked], on_progress: Progress
    ) -> Made:
        """HSCR's records, of which only the dispreferred answers may be others."""
        method = Arm(HSCR, arm.label)
        made = super()._made(method, config, seed, sources, on_progress)
        if arm.name == DPO:
            return made.but(records=tuple(map(most_dispreferred, made.records)))
        if arm.name == RANDOM:
            others = Others(self.vlm, sources, config)
            records = tuple(map(others.of, made.records))
            kept = sum(record.method == HSCR for record in records)
            return made.but(records=records, skipped={**made.skipped, ALIKE: kept})
        return made

    def _answers(self, adapter: str | None, config: EvaluateConfig) -> dict[str, Any]:
        views = {view: self._answers_under(view, adapter, config) for view in VIEWS}
        return {**super()._answers(adapter, config), "views": views}

    @torch.inference_mode()
    def _answers_under(self, view: str, adapter: str | None, config: EvaluateConfig) -> dict[str, str]:
        """Greedy answers when most visual tokens are dropped, the image is black, or is another's."""
        items = self.suite.items
        pictures = {item.image_digest: item.image_png for item in items}
        digests = list(pictures)
        following = dict(zip(digests, [*digests[1:], digests[0]], strict=True))
        answers: dict[str, str] = {}
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            shown = {
                item.image_digest: open_png(
                    pictures[following[item.image_digest] if view == "swapped" else item.image_digest]
                )
                for item in batch
            }
            if view == "blank":
                shown = {digest: Image.new("L", image.size) for digest, image in shown.items()}
            tokens = self.vlm.encode(shown)
            seen = [
                degrade(tokens[item.image_digest], config.drop_rate, "delete", item.image_digest, config.seed)
                if view == "dropped"
                else View.whole(tokens[item.image_digest])
                for item in batch
            ]
            with self.vlm.use(adapter):
                prompts = [self.vlm.prompt_ids(item.question) for item in batch]
                texts = self.vlm.generate_greedy(self.vlm.prefill(self.vlm.embed(prompts, seen)))
            answers |= {item.id: text for item, text in zip(batch, texts, strict=True)}
        return answers


def _negatives(arm: Arm) -> str:
    return arm.name if arm.name in {RANDOM, DPO} else HSCR


def judged(asked: Asked, said: str) -> Asked:
    """What the reviewer leaves to train on: the base model's right answer, or else its correction."""
    chosen = said if is_right(asked.example, said) else asked.example.answer
    return Asked(asked.example, asked.source.but(chosen=chosen), asked.image)


def most_dispreferred(record: PreferenceRecord) -> PreferenceRecord:
    """The record as a pair, with its least similar dispreferred answer."""
    return record.but(rejected=record.rejected[-1:])


class Others:
    """Preferred answers to other questions of the same kind."""

    def __init__(self, vlm: VLM, asked: Sequence[Asked], config: GenerateConfig) -> None:
        self._vlm, self._config = vlm, config
        self._asked = {each.source.id: each for each in asked}
        self._by_kind: dict[str, list[str]] = {}
        for each in asked:
            texts = self._by_kind.setdefault(each.example.kind, [])
            if each.source.chosen not in texts:
                texts.append(each.source.chosen)

    def of(self, record: PreferenceRecord) -> PreferenceRecord:
        """As many as the record has, drawn uniformly among those that say something else, by similarity.

        Fewer where its kind has fewer. Where all questions of the kind have one answer, as skewed data may
        have it, the record keeps HSCR's, so that no arm sees other questions than the rest.
        """
        each = self._asked[record.source]
        pool = self._unlike(each)
        random.Random(f"{record.id}\0{self._config.seed}").shuffle(pool)  # noqa: S311
        texts = pool[: len(record.rejected)]
        if not texts:
            return record
        scores = similarities(record.chosen, texts, self._config.rerank)
        probable = mean_probabilities(self._vlm, each, texts)
        drawn = [
            Response(text=text, similarity=score, mean_probability=probability)
            for text, score, probability in zip(texts, scores, probable, strict=True)
        ]
        return record.but(rejected=tuple(sorted(drawn, key=lambda each: -each.similarity)), method=RANDOM)

    def _unlike(self, each: Asked) -> list[str]:
        kind, right = each.example.kind, each.source.chosen
        value = parse_answer(kind, right)
        return [
            text
            for text in self._by_kind[kind]
            if words(text) != words(right) and (value is None or parse_answer(kind, text) != value)
        ]
