"""Dispreferred answers that the model did not write: what stands for the paper's GPT-4o pairs here."""

import hashlib
from collections.abc import Iterator, Sequence

import torch

from hscr.ablate.sources import Asked, wrong_answers
from hscr.config import GenerateConfig
from hscr.contrast.generate import Skipped
from hscr.contrast.rerank import levels, similarities
from hscr.errors import InvalidConfig
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord, Response

METHOD = "external"


def external(
    vlm: VLM, sources: Sequence[Asked], config: GenerateConfig
) -> Iterator[PreferenceRecord | Skipped]:
    """Per source a record of wrong answers written from the grammar, by someone who knows the study.

    As many candidates as Eq. 4 draws, drawn uniformly from all wrong answers of the right answer's form, then
    re-ranked and spaced by the same rules. The model neither proposes nor filters them; it only measures
    their probability. Raises InvalidConfig for a similarity that needs an embedder.
    """
    if config.rerank.similarity == "sentence_embedding":
        raise InvalidConfig(
            "rerank.similarity: answers by the grammar are compared by words.",
            remedy="Set it to corley_mihalcea or token_f1.",
        )
    for each in sources:
        texts = wrong_answers(each.example, config.substitute.candidates, config.seed)
        scores = similarities(each.source.chosen, texts, config.rerank)
        ranked = levels(scores, config.rerank)
        if not ranked:
            yield Skipped(each.source.id, "No wrong answer is far enough from the right one.")
            continue
        probable = mean_probabilities(vlm, each, [texts[index] for index in ranked])
        rejected = [
            Response(text=texts[index], similarity=scores[index], mean_probability=probability)
            for index, probability in zip(ranked, probable, strict=True)
        ]
        yield _record(vlm, each, rejected, config)


@torch.inference_mode()
def mean_probabilities(vlm: VLM, each: Asked, texts: Sequence[str]) -> list[float]:
    """exp(mean token log p) of each text with the whole image, under the base model."""
    visual = vlm.encode({"image": each.image})["image"]
    context = vlm.prefill(vlm.embed([vlm.prompt_ids(each.source.question)], [visual]))
    (logprobs,) = vlm.completion_logprobs(context, [[vlm.completion_ids(text) for text in texts]])
    return [round(float(row.mean().exp()), 4) for row in logprobs]


def _record(vlm: VLM, each: Asked, rejected: Sequence[Response], config: GenerateConfig) -> PreferenceRecord:
    made = "\0".join([METHOD, each.source.id, config.digest, vlm.digest])
    return PreferenceRecord(
        **each.source.model_dump(exclude={"id"}),
        id=f"pref_{hashlib.sha256(made.encode()).hexdigest()[:32]}",
        rejected=tuple(rejected),
        source=each.source.id,
        method=METHOD,
        model_digest=vlm.digest,
        numeric_mode=vlm.numeric_mode,
        config_digest=config.digest,
        seed=config.seed,
    )
