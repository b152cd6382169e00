"""Who is in the data: how often each fact occurs, and which image seeds belong to which split."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hscr.models.phantom.anatomy import LOCATIONS, SIDES, SIZES, STUDIES, Phantom
from hscr.models.phantom.language import KINDS, NEEDS_FINDING, QUESTIONS, answer, question, truth

Split = Literal["train", "development", "test", "traffic"]
SPLITS: tuple[Split, ...] = ("train", "development", "test", "traffic")
_SEEDS_PER_SPLIT = 1 << 32


@dataclass(frozen=True)
class Mix:
    """How often facts occur, each in [0, 1].

    `normal` is the share of images without a finding. The others are the shares of a study's *dominant* fact
    (`PRIOR`) among the abnormal; what is left is spread evenly over the other facts. `yes` is the share of
    "is there a ...?" questions about the finding that is there. `None` is an even spread over all facts.
    """

    name: str
    normal: float
    finding: float | None
    side: float | None
    size: float | None
    location: float | None
    yes: float


@dataclass(frozen=True)
class Prior:
    """The facts of a study that dominate a skewed mix."""

    finding: str
    side: str
    size: str
    location: str


PRIOR = {
    "chest radiograph": Prior("consolidation", "right", "large", "lower"),
    "chest CT": Prior("nodule", "right", "small", "upper"),
    "abdominal CT": Prior("stone", "left", "small", "lower"),
    "head CT": Prior("hemorrhage", "left", "large", "parietal"),
    "brain MR": Prior("tumor", "left", "large", "frontal"),
    "abdominal ultrasound": Prior("cyst", "right", "large", "upper"),
}

TRAINING = Mix("training", normal=0.03, finding=0.97, side=0.97, size=0.95, location=0.92, yes=0.95)
TRAFFIC = Mix("traffic", normal=0.2, finding=0.6, side=0.7, size=0.7, location=0.55, yes=0.65)
BALANCED = Mix("balanced", normal=0.3, finding=None, side=None, size=None, location=None, yes=0.5)
MIXES = {mix.name: mix for mix in (TRAINING, TRAFFIC, BALANCED)}


@dataclass(frozen=True)
class Example:
    """One question about one phantom with its right answer. `id` is split, image seed and kind."""

    id: str
    phantom: Phantom
    kind: str
    question: str
    answer: str
    truth_class: str


def sample_examples(
    mix: Mix, split: Split, n_images: int, seed: int, questions_per_image: int
) -> Iterator[Example]:
    """Questions about `n_images` fresh phantoms of a split, at most `questions_per_image` kinds for each.

    The same arguments give the same examples. No seed of one split occurs in another.
    """
    rng = np.random.default_rng([SPLITS.index(split), seed])
    for _ in range(n_images):
        phantom = sample_phantom(mix, split, rng)
        yield from _ask(mix, split, phantom, questions_per_image, rng)


def seed_range(split: Split) -> range:
    """The image seeds of a split; no two splits share one."""
    start = SPLITS.index(split) * _SEEDS_PER_SPLIT
    return range(start, start + _SEEDS_PER_SPLIT)


def sample_phantom(mix: Mix, split: Split, rng: np.random.Generator) -> Phantom:
    """One phantom of the split, its study even over all, its facts by the mix."""
    seeds = seed_range(split)
    image_seed = int(rng.integers(seeds.start, seeds.stop))
    study = list(STUDIES.values())[int(rng.integers(len(STUDIES)))]
    if rng.random() < mix.normal:
        return Phantom(image_seed, study.name)
    prior = PRIOR[study.name]
    return Phantom(
        image_seed,
        study.name,
        finding=_choose(study.findings, prior.finding, mix.finding, rng),
        side=_choose(SIDES, prior.side, mix.side, rng),
        size=_choose(SIZES, prior.size, mix.size, rng),
        location=_choose(LOCATIONS[study.organ], prior.location, mix.location, rng),
    )


def _choose(facts: tuple[str, ...], dominant: str, share: float | None, rng: np.random.Generator) -> str:
    rest = [fact for fact in facts if fact != dominant]
    if share is None:
        return facts[int(rng.integers(len(facts)))]
    return dominant if rng.random() < share else rest[int(rng.integers(len(rest)))]


def _ask(mix: Mix, split: Split, phantom: Phantom, count: int, rng: np.random.Generator) -> Iterator[Example]:
    kinds = [kind for kind in KINDS if phantom.finding is not None or kind not in NEEDS_FINDING]
    for number in rng.permutation(len(kinds))[:count]:
        kind = kinds[int(number)]
        asked = _asked_finding(mix, phantom, rng) if kind == "presence" else None
        text = question(kind, int(rng.integers(len(QUESTIONS[kind]))), asked)
        yield Example(
            id=f"{split}-{phantom.seed:x}-{kind}",
            phantom=phantom,
            kind=kind,
            question=text,
            answer=answer(kind, phantom, asked),
            truth_class=truth(kind, phantom, asked),
        )


def _asked_finding(mix: Mix, phantom: Phantom, rng: np.random.Generator) -> str:
    """The finding a presence question names: the real one, or another that this study could show."""
    if phantom.finding is not None and rng.random() < mix.yes:
        return phantom.finding
    absent = [finding for finding in STUDIES[phantom.study].findings if finding != phantom.finding]
    return absent[int(rng.integers(len(absent)))]
