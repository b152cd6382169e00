"""The gate: three verdicts, intervals that cover, and a refusal to compare what cannot be compared."""

from dataclasses import replace

import numpy as np
import pytest

from hscr.config import GateConfig
from hscr.errors import InvalidConfig, InvalidInput
from hscr.evaluate.gate import Judgement, Measured, compare, interval, judge
from hscr.evaluate.metrics import DEPENDENCE, HALLUCINATION, MACRO, OMISSION, summarise
from hscr.evaluate.outcome import Outcome
from hscr.records import GateVerdict

CONFIG = GateConfig(resamples=500)
CLASSES = {"side": ("left", "right"), "abnormal": ("yes", "no"), "caption": ("nodule", "normal")}


def outcomes(
    seed: int, right: float, *, images: int = 80, hallucinated: float = 0.1, each: int = 2
) -> list[Outcome]:
    """One version's outcomes: every image asked `each` questions of each kind; `seed` fixes the questions."""
    asked, answers = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    made = []
    for image in range(images):
        luck = answers.normal(0, 0.5)  # what one image's questions have in common
        for kind, classes in CLASSES.items():
            for number in range(each):
                captioned = kind == "caption"
                made.append(
                    Outcome(
                        item_id=f"{image}/{kind}/{number}",
                        cluster=f"image {image}",
                        kind=kind,
                        truth_class=str(asked.choice(classes, p=(0.8, 0.2))),
                        truth="",
                        text="",
                        score=float(answers.normal() + luck < 2 * right - 1),
                        parsed=True,
                        hallucinated=bool(answers.random() < hallucinated) if captioned else None,
                        omitted=bool(answers.random() < 0.1) if captioned else None,
                    )
                )
    return made


def improved(base: list[Outcome], seed: int, gain: float, hallucinated: float = 0.0) -> list[Outcome]:
    """`gain` > 0 corrects that share of answers, < 0 spoils it; `hallucinated` of the captions imagine."""
    rng = np.random.default_rng(seed)

    def change(outcome: Outcome) -> Outcome:
        chosen, worse = rng.random() < abs(gain), rng.random() < hallucinated
        score = (1.0 if gain > 0 else 0.0) if chosen else outcome.score
        imagined = None if outcome.hallucinated is None else outcome.hallucinated or worse
        return replace(outcome, score=score, hallucinated=imagined)

    return [change(outcome) for outcome in base]


BASE = outcomes(1, 0.6)
DEPENDS = {outcome.item_id: 1.0 + (at % 7) / 10 for at, outcome in enumerate(BASE[:200])}


def judged(candidate: list[Outcome], shift: float = 0.0, noise: float = 0.05, **config: object) -> Judgement:
    rng = np.random.default_rng(7)
    moved = {item: value + shift + rng.normal(0, noise) for item, value in DEPENDS.items()}
    return judge(Measured(candidate, moved), Measured(BASE, DEPENDS), CONFIG.model_copy(update=config))


def test_pass_needs_a_better_target_and_no_harm() -> None:
    verdict, reasons, differences = judged(improved(BASE, 2, 0.3))
    assert verdict is GateVerdict.PASS
    assert differences[MACRO].low > 0
    assert differences.keys() >= {MACRO, HALLUCINATION, OMISSION, DEPENDENCE}
    assert len(reasons) == 3


def test_the_same_answers_are_inconclusive() -> None:
    verdict, reasons, differences = judged(BASE, noise=0.0)
    assert verdict is GateVerdict.INCONCLUSIVE
    assert (differences[MACRO].low, differences[MACRO].mean, differences[MACRO].high) == (0, 0, 0)
    assert "not shown to be better" in reasons[0]


def test_a_worse_target_fails() -> None:
    verdict, reasons, _ = judged(improved(BASE, 3, -0.3))
    assert verdict is GateVerdict.FAIL
    assert "macro_score is worse" in reasons[0]


def test_a_better_target_with_more_hallucination_fails() -> None:
    verdict, reasons, differences = judged(improved(BASE, 4, 0.3, hallucinated=0.3))
    assert differences[MACRO].low > 0
    assert verdict is GateVerdict.FAIL
    assert any("hallucination_rate is worse beyond" in reason for reason in reasons)


def test_a_better_target_with_less_dependence_fails() -> None:
    verdict, reasons, differences = judged(improved(BASE, 2, 0.3), shift=-0.4)
    assert differences[DEPENDENCE].mean == pytest.approx(-0.4, abs=0.02)
    assert verdict is GateVerdict.FAIL
    assert any("visual_dependence is worse beyond" in reason for reason in reasons)


def test_more_dependence_is_no_harm() -> None:
    assert judged(improved(BASE, 2, 0.3), shift=+0.4).verdict is GateVerdict.PASS


def test_harm_that_is_not_shown_is_inconclusive() -> None:
    verdict, reasons, differences = judged(improved(BASE, 2, 0.3), shift=0.2, noise=4.0)
    assert differences[DEPENDENCE].mean < -CONFIG.dependence_margin
    assert differences[DEPENDENCE].high > 0
    assert verdict is GateVerdict.INCONCLUSIVE
    assert any("may be worse" in reason for reason in reasons)


def test_a_pass_says_where_the_interval_leaves_doubt() -> None:
    candidate = improved(BASE, 2, 0.3)
    rng = np.random.default_rng(0)
    captions = [o for o in candidate if o.hallucinated is not None]
    swapped = dict(zip([o.item_id for o in captions], rng.permutation(len(captions)), strict=True))
    shuffled = [
        replace(o, hallucinated=captions[swapped[o.item_id]].hallucinated) if o.item_id in swapped else o
        for o in candidate
    ]
    verdict, reasons, differences = judged(shuffled)
    assert differences[HALLUCINATION].high > CONFIG.hallucination_margin
    assert differences[HALLUCINATION].mean == pytest.approx(0)
    assert verdict is GateVerdict.PASS
    assert any("reaches beyond the margin" in reason for reason in reasons)


def test_margins_come_from_the_configuration() -> None:
    candidate = improved(BASE, 4, 0.3, hallucinated=0.3)
    assert judged(candidate, hallucination_margin=0.5).verdict is GateVerdict.PASS
    assert judged(improved(BASE, 2, 0.3), shift=-0.4, dependence_margin=0.5).verdict is GateVerdict.PASS


def test_too_few_questions_or_images_are_inconclusive() -> None:
    better = improved(BASE, 2, 0.3)
    verdict, reasons, _ = judged(better, min_questions=len(BASE) + 1)
    assert verdict is GateVerdict.INCONCLUSIVE
    assert reasons == (f"Only {len(BASE)} questions; at least {len(BASE) + 1} are needed.",)
    crowded = [replace(o, cluster=o.cluster[:7]) for o in BASE]
    few = judge(Measured(improved(crowded, 2, 0.3), DEPENDS), Measured(crowded, DEPENDS), CONFIG)
    assert few.verdict is GateVerdict.INCONCLUSIVE
    assert "images" in few.reasons[0]


def test_what_was_not_measured_cannot_pass() -> None:
    verdict, reasons, _ = judge(Measured(improved(BASE, 2, 0.3)), Measured(BASE), CONFIG)
    assert verdict is GateVerdict.INCONCLUSIVE
    assert any("visual_dependence was not measured" in reason for reason in reasons)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="macro_score"):
        judged(BASE, target="cider")


@pytest.mark.parametrize("broken", ["missing", "extra", "twice", "nan", "nothing"])
def test_what_cannot_be_paired_is_refused(broken: str) -> None:
    candidate = {
        "missing": BASE[1:],
        "extra": [*BASE, replace(BASE[0], item_id="new")],
        "twice": [*BASE, BASE[0]],
        "nan": [replace(BASE[0], score=float("nan")), *BASE[1:]],
        "nothing": [],
    }[broken]
    with pytest.raises(InvalidInput):
        judge(Measured(candidate, DEPENDS), Measured(BASE, DEPENDS), CONFIG)
    if broken == "nothing":
        with pytest.raises(InvalidInput):
            judge(Measured([]), Measured([]), CONFIG)


def test_dependence_must_be_of_the_same_items_and_finite() -> None:
    first = next(iter(DEPENDS))
    rest = {item: value for item, value in DEPENDS.items() if item != first}
    for changed in (rest, {**DEPENDS, first: float("inf")}):
        with pytest.raises(InvalidInput):
            judge(Measured(BASE, changed), Measured(BASE, DEPENDS), CONFIG)
    foreign = {"elsewhere": 1.0}
    with pytest.raises(InvalidInput, match="outside the suite"):
        judge(Measured(BASE, foreign), Measured(BASE, foreign), CONFIG)


def test_the_observed_difference_is_the_difference_of_the_scores() -> None:
    candidate = improved(outcomes(5, 0.5), 6, 0.2)
    base = outcomes(5, 0.5)
    observed = compare(Measured(candidate), Measured(base), CONFIG)[MACRO].mean
    assert observed == pytest.approx(summarise(candidate)[MACRO] - summarise(base)[MACRO])


def test_the_vectorised_bootstrap_is_the_literal_one() -> None:
    rng = np.random.default_rng(0)
    images, kinds = 12, ("a", "b")
    rows = [
        (float(rng.normal()), f"i{i}", (kind, str(rng.integers(2))))
        for i in range(images)
        for kind in kinds
        for _ in range(2)
    ]
    gains, clusters, cells = zip(*rows, strict=True)
    ours = interval(gains, clusters, CONFIG, cells=cells, seed=9)
    weights = np.random.default_rng(9).multinomial(images, np.full(images, 1 / images), size=CONFIG.resamples)
    draws = []
    for draw in weights:
        sample = [row for i in range(images) for row in rows if row[1] == f"i{i}" for _ in range(draw[i])]
        outer: dict[str, dict[str, list[float]]] = {}
        for gain, _, (kind, truth) in sample:
            outer.setdefault(kind, {}).setdefault(truth, []).append(gain)
        draws.append(
            np.mean([np.mean([np.mean(values) for values in classes.values()]) for classes in outer.values()])
        )
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(draws, (0.025, 0.975))))


def test_the_interval_covers_at_its_confidence() -> None:
    # 60 images of 6 correlated questions, true difference 0.1: a 95 % interval covers about 95 times in 100.
    rng = np.random.default_rng(11)
    images, each, trials = 60, 6, 200
    clusters = [f"{image}" for image in range(images) for _ in range(each)]
    cells = [("kind", str(number % 2)) for number in range(images * each)]
    covered = naive = 0
    for trial in range(trials):
        shared = rng.normal(0, 1, images).repeat(each)
        gains = 0.1 + shared + rng.normal(0, 0.5, images * each)
        found = interval(gains.tolist(), clusters, CONFIG, cells=cells, seed=trial)
        covered += found.low <= 0.1 <= found.high
        independent = interval(gains.tolist(), [str(n) for n in range(len(gains))], CONFIG, seed=trial)
        naive += independent.low <= 0.1 <= independent.high
    assert 0.91 <= covered / trials <= 0.985
    assert naive / trials < 0.75  # what ignoring the images would have claimed


def test_the_gate_is_reproducible_and_its_seed_matters() -> None:
    better = improved(BASE, 2, 0.1)
    first, again = judged(better), judged(better)
    assert first == again
    other = judge(Measured(better), Measured(BASE), CONFIG, seed=1).differences[MACRO]
    assert other.mean == first.differences[MACRO].mean
    assert other.low != first.differences[MACRO].low
