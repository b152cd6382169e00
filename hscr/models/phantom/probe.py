"""How well a phantom model answers, and how much of that comes from the image.

Every question is asked three times: with the whole image, with most of its projected visual tokens deleted,
and with a black image. The score is macro-averaged, over truth classes within a kind and then over kinds, so
that a model that only knows what is common scores low.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from hscr.models.phantom.anatomy import IMAGE_SIZE, render
from hscr.models.phantom.data import BALANCED, PRIOR, Example, Mix, Split, sample_examples
from hscr.models.phantom.language import KINDS, CaptionFacts, caption_errors, parse_answer, parse_caption
from hscr.models.phantom.packing import prompt_head, prompt_tail

VIEWS = ("full", "dropped", "blank")
_MAX_TOKENS = 32


@dataclass(frozen=True)
class Outcome:
    """One question, what the model said under one view, and whether that is right."""

    example: Example
    text: str
    value: str | None
    correct: bool


@dataclass(frozen=True)
class Report:
    """Outcomes per view. All figures are in [0, 1]."""

    outcomes: dict[str, list[Outcome]]

    def score(self, view: str) -> float:
        """Mean over kinds of the mean over truth classes of the share of right answers."""
        return mean(self.by_kind(view).values())

    def by_kind(self, view: str) -> dict[str, float]:
        """Per kind, the mean over its truth classes."""
        return {
            kind: mean(self.by_class(view, kind).values())
            for kind in KINDS
            if any(outcome.example.kind == kind for outcome in self.outcomes[view])
        }

    def by_class(self, view: str, kind: str) -> dict[str, float]:
        """Per truth class of a kind, the share of right answers."""
        groups: dict[str, list[bool]] = defaultdict(list)
        for outcome in self.outcomes[view]:
            if outcome.example.kind == kind:
                groups[outcome.example.truth_class].append(outcome.correct)
        return {truth: mean(hits) for truth, hits in sorted(groups.items())}

    def side_accuracy(self, view: str, *, dominant: bool) -> float:
        """Share of right answers to side questions where the truth is (not) the side dominant in training."""
        return _share(
            outcome.correct
            for outcome in self.outcomes[view]
            if outcome.example.kind == "side"
            and (outcome.example.truth_class == PRIOR[outcome.example.phantom.study].side) is dominant
        )

    def toward_prior(self, view: str) -> float:
        """Of the wrong answers where the prior's answer is wrong too, the share that gives the prior's."""
        wrong = [outcome for outcome in self.outcomes[view] if not outcome.correct]
        priors = [(outcome, _prior(outcome.example)) for outcome in wrong]
        return _share(
            outcome.value == prior
            for outcome, prior in priors
            if prior not in {None, outcome.example.truth_class}
        )

    def parsed(self, view: str) -> float:
        """Share of answers inside the grammar."""
        return _share(outcome.value is not None for outcome in self.outcomes[view])

    def captions(self, view: str) -> tuple[float, float, float]:
        """Shares of captions with every fact right, with an absent finding, without the real one."""
        told = [outcome for outcome in self.outcomes[view] if outcome.example.kind == "caption"]
        exact = _share(parse_caption(o.text) == CaptionFacts.of(o.example.phantom) for o in told)
        errors = [caption_errors(o.text, o.example.phantom) for o in told]
        return exact, _share(error[0] for error in errors), _share(error[1] for error in errors)


def _share(hits: Iterable[bool]) -> float:
    counted = list(hits)
    return mean(counted) if counted else float("nan")


def _prior(example: Example) -> str | None:
    prior = PRIOR[example.phantom.study]
    answers = {
        "abnormal": "yes",
        "presence": "yes",
        "finding": prior.finding,
        "side": prior.side,
        "size": prior.size,
        "location": f"{prior.side} {prior.location}",
        "caption": prior.finding,
    }
    return answers.get(example.kind)


def evaluate(
    model_dir: Path,
    *,
    split: Split = "development",
    mix: Mix = BALANCED,
    images: int = 200,
    seed: int = 0,
    drop_rate: float = 0.7,
    views: Sequence[str] = VIEWS,
) -> Report:
    """Ask every kind of question about `images` phantoms of a split; greedy answers, float32.

    `drop_rate` in [0, 1] is the share of projected visual tokens deleted in the view `dropped`; what is left
    keeps its order and moves together. The choice depends on the example's id alone.
    """
    model = LlavaForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()
    examples = list(sample_examples(mix, split, images, seed, len(KINDS)))
    return ask(model, AutoProcessor.from_pretrained(model_dir), examples, drop_rate=drop_rate, views=views)


@torch.inference_mode()
def ask(
    model: LlavaForConditionalGeneration,
    processor: object,
    examples: Sequence[Example],
    *,
    drop_rate: float = 0.7,
    views: Sequence[str] = VIEWS,
) -> Report:
    """Answer the examples under each view."""
    tokens = _visual_tokens(model, processor, examples)
    blank = _features(model, processor, [np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)])[0]
    visual: dict[str, Callable[[Example], Tensor]] = {
        "full": lambda example: tokens[example.phantom.seed],
        "dropped": lambda example: drop(tokens[example.phantom.seed], drop_rate, example.id),
        "blank": lambda _: blank,
    }
    tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    return Report({view: _answer_all(model, tokenizer, examples, visual[view]) for view in views})


def drop(tokens: Tensor, rate: float, name: str) -> Tensor:
    """Keep round((1 - rate) * N) of [N, D] visual tokens in their order, chosen by the hash of `name`."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    kept = np.random.default_rng(seed).permutation(len(tokens))[: round((1 - rate) * len(tokens))]
    return tokens[np.sort(kept)]


def _visual_tokens(
    model: LlavaForConditionalGeneration, processor: object, examples: Sequence[Example]
) -> dict[int, Tensor]:
    phantoms = list({example.phantom.seed: example.phantom for example in examples}.values())
    found: dict[int, Tensor] = {}
    for start in range(0, len(phantoms), 64):
        batch = phantoms[start : start + 64]
        features = _features(model, processor, [np.asarray(render(phantom)) for phantom in batch])
        found |= {phantom.seed: tokens for phantom, tokens in zip(batch, features, strict=True)}
    return found


def _features(
    model: LlavaForConditionalGeneration, processor: object, pictures: list[np.ndarray]
) -> list[Tensor]:
    rgb = [np.repeat(picture[..., None], 3, axis=-1) for picture in pictures]
    pixels = processor.image_processor(rgb, return_tensors="pt")["pixel_values"]  # type: ignore[attr-defined]
    return list(model.get_image_features(pixel_values=pixels).pooler_output)


def _answer_all(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    visual: Callable[[Example], Tensor],
) -> list[Outcome]:
    """Questions of one length go together, so that no padding changes what they attend to."""
    groups: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for index, example in enumerate(examples):
        tail = prompt_tail(tokenizer, example.question)
        groups[len(tail)].append((index, tail))
    answers: dict[int, str] = {}
    for group in groups.values():
        for start in range(0, len(group), 96):
            chosen = group[start : start + 96]
            tails = torch.tensor([tail for _, tail in chosen])
            features = torch.stack([visual(examples[index]) for index, _ in chosen])
            texts = _greedy(model, tokenizer, features, tails)
            answers |= {index: text for (index, _), text in zip(chosen, texts, strict=True)}
    return [_outcome(example, answers[index]) for index, example in enumerate(examples)]


def _outcome(example: Example, text: str) -> Outcome:
    value = parse_answer(example.kind, text)
    return Outcome(example, text, value, value == example.truth_class)


def _greedy(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, visual: Tensor, tails: Tensor
) -> list[str]:
    """Greedy continuations of [B, T] question tokens behind [B, N, D] visual tokens."""
    embed = model.get_input_embeddings()
    head = torch.tensor(prompt_head(tokenizer, 0)).expand(len(tails), -1)
    inputs = torch.cat([embed(head), visual, embed(tails)], dim=1)
    written, cache = [], None
    done = torch.zeros(len(tails), dtype=torch.bool)
    for _ in range(_MAX_TOKENS):
        step = model.model.language_model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        token = (
            model.lm_head(step.last_hidden_state[:, -1]).argmax(-1).masked_fill(done, tokenizer.pad_token_id)
        )
        written.append(token)
        done |= token == tokenizer.eos_token_id
        if done.all():
            break
        inputs = embed(token)[:, None]
    return [
        text.strip() for text in tokenizer.batch_decode(torch.stack(written, 1), skip_special_tokens=True)
    ]


def show(report: Report, console: Console | None = None) -> None:
    """Print the report as tables."""
    out = console or Console()
    table = Table("kind", *report.outcomes)
    rows = {view: report.by_kind(view) for view in report.outcomes}
    for kind in next(iter(rows.values())):
        table.add_row(kind, *(f"{rows[view][kind]:.3f}" for view in rows))
    table.add_section()
    table.add_row("score", *(f"{report.score(view):.3f}" for view in rows))
    table.add_row("side, dominant", *(f"{report.side_accuracy(view, dominant=True):.3f}" for view in rows))
    table.add_row("side, minority", *(f"{report.side_accuracy(view, dominant=False):.3f}" for view in rows))
    table.add_row("errors toward the prior", *(f"{report.toward_prior(view):.3f}" for view in rows))
    table.add_row("in the grammar", *(f"{report.parsed(view):.3f}" for view in rows))
    for index, name in enumerate(("captions exact", "captions hallucinating", "captions omitting")):
        table.add_row(name, *(f"{report.captions(view)[index]:.3f}" for view in rows))
    out.print(table)
