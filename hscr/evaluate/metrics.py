"""From answers to numbers: one outcome per item, and the scores of a whole suite."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from hscr.errors import InvalidInput
from hscr.evaluate.llavamed import closed_llavamed_run_eval, closed_strict_word, open_recall
from hscr.evaluate.outcome import Outcome
from hscr.evaluate.suites import CLOSED, OPEN, SuiteItem
from hscr.models.phantom.language import CaptionFacts, caption_errors, parse_answer, parse_caption

MACRO = "macro_score"
ACCURACY = "accuracy"
HALLUCINATION = "hallucination_rate"
OMISSION = "omission_rate"
PARSED = "parse_rate"
DEPENDENCE = "visual_dependence"
DROPPED = "macro_score_dropped"
BLANK = "macro_score_blank"
KIND = "kind/"
"""Prefix of one kind's share in the macro score."""


def score(item: SuiteItem, text: str) -> Outcome:
    """Score one answer: a phantom's by the canonical value it parses to, a row's by LLaVA-Med's rules.

    An answer outside the phantom's grammar is wrong. A caption is right if all its facts are.
    """
    value, parsed = _value(item, text)
    hallucinated, omitted = _caption_errors(item, text)
    return Outcome(
        item_id=item.id,
        cluster=item.image_cluster,
        kind=item.kind,
        truth_class=item.truth_class,
        truth=item.truth,
        text=text,
        score=value,
        parsed=parsed,
        hallucinated=hallucinated,
        omitted=omitted,
    )


def _value(item: SuiteItem, text: str) -> tuple[float, bool]:
    if item.kind == OPEN:
        return open_recall(text, item.truth), bool(text.strip())
    if item.kind == CLOSED:
        return float(closed_strict_word(text, item.truth)), bool(text.strip())
    if item.kind == "caption":
        assert item.phantom is not None
        facts = parse_caption(text)
        return float(facts == CaptionFacts.of(item.phantom)), facts is not None
    answer = parse_answer(item.kind, text)
    return float(answer == item.truth_class), answer is not None


def _caption_errors(item: SuiteItem, text: str) -> tuple[bool, bool] | tuple[None, None]:
    return caption_errors(text, item.phantom) if item.kind == "caption" and item.phantom else (None, None)


def summarise(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Every score that the outcomes allow; all are fractions in [0, 1].

    `macro_score` is the mean over question kinds of the mean over truth classes of the mean score, so that
    answering by another prior gains on one class what it loses on the other.
    """
    if not outcomes:
        raise InvalidInput("There is nothing to score.", remedy="Give a suite with at least one question.")
    kinds = kind_scores(outcomes)
    scores = {MACRO: fmean(kinds.values()), ACCURACY: _mean(o.score for o in outcomes)}
    scores[PARSED] = _mean(o.parsed for o in outcomes)
    scores |= {f"{KIND}{kind}": value for kind, value in kinds.items()}
    return scores | _caption_scores(outcomes) | _row_scores(outcomes)


def kind_scores(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """Per question kind, the mean over its truth classes of the mean score."""
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        cells[outcome.kind][outcome.truth_class].append(outcome.score)
    return {
        kind: fmean(fmean(values) for values in classes.values()) for kind, classes in sorted(cells.items())
    }


def _caption_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    captions = [o for o in outcomes if o.hallucinated is not None and o.omitted is not None]
    if not captions:
        return {}
    return {
        HALLUCINATION: _mean(bool(o.hallucinated) for o in captions),
        OMISSION: _mean(bool(o.omitted) for o in captions),
    }


def _row_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    scores = {}
    if rows := [o for o in outcomes if o.kind == OPEN]:
        scores["llavamed/open_recall"] = _mean(o.score for o in rows)
    if rows := [o for o in outcomes if o.kind == CLOSED]:
        rules: dict[str, Callable[[str, str], bool]] = {
            "llavamed/closed_run_eval": closed_llavamed_run_eval,
            "closed_strict_word": closed_strict_word,
        }
        scores |= {name: _mean(rule(o.text, o.truth) for o in rows) for name, rule in rules.items()}
    return scores


def _mean(values: Iterable[float]) -> float:
    return fmean(float(value) for value in values)
