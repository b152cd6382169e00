"""What every arm starts from: questions about phantoms with their right answers, and wrong ones by hand."""

import io
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from hscr.ablate.setting import Setting
from hscr.imaging.decode import prepare
from hscr.imaging.guard import Limits
from hscr.models.phantom.anatomy import FINDINGS, LOCATIONS, SIDES, SIZES, STUDIES, Phantom, photograph
from hscr.models.phantom.data import MIXES, Example, sample_examples
from hscr.models.phantom.language import KINDS, MODALITIES, NEEDS_FINDING, NORMAL, ORGANS, caption, say
from hscr.records import PreferenceSource

_LEAST_QUESTIONS = len(KINDS) - len(NEEDS_FINDING)
"""that every phantom can be asked"""
_FIRST_SEED = 1000
"""The model itself was trained on draws of low seeds."""


@dataclass(frozen=True)
class Asked:
    """A question about a phantom with its right answer."""

    example: Example
    source: PreferenceSource
    image: Image.Image


def asked(setting: Setting, seed: int) -> Iterator[Asked]:
    """The setting's number of questions, by images; determined by setting and seed.

    They are fresh draws of images that no evaluation asks about.
    """
    images = -(-setting.records // min(setting.questions, _LEAST_QUESTIONS))
    examples = sample_examples(MIXES[setting.mix], "train", images, _FIRST_SEED + seed, setting.questions)
    yield from pictured(itertools.islice(examples, setting.records))


def pictured(examples: Iterable[Example]) -> Iterator[Asked]:
    """Each example with its image as the gateway prepares it."""
    picture = lru_cache(maxsize=2)(_photograph)
    for example in examples:
        image_digest, image = picture(example.phantom)
        source = PreferenceSource(
            id=example.id,
            image_digest=image_digest,
            study=f"phantom-{example.phantom.seed:x}",
            question=example.question,
            chosen=example.answer,
            consent=True,
        )
        yield Asked(example, source, image)


def wrong_answers(example: Example, count: int, seed: int) -> list[str]:
    """At most `count` wrong answers in the right answer's own sentence, drawn uniformly, in drawn order.

    They say another fact that this study could have shown; a caption differs in one fact or more of its
    finding, size, side and location, or says that there is no finding, or one where there is none.
    """
    texts = [text for text in _other_answers(example) if text != example.answer]
    random.Random(f"{example.id}\0{seed}").shuffle(texts)  # noqa: S311
    return texts[:count]


def _other_answers(example: Example) -> list[str]:
    phantom, study = example.phantom, STUDIES[example.phantom.study]
    if example.kind == "caption":
        return [caption(Phantom(phantom.seed, study.name)), *map(caption, _abnormal(phantom))]
    values = {
        "modality": MODALITIES,
        "organ": ORGANS,
        "abnormal": ("yes", "no"),
        "presence": ("yes", "no"),
        "finding": (*study.findings, NORMAL),
        "side": SIDES,
        "location": [f"{side} {place}" for side in SIDES for place in LOCATIONS[study.organ]],
        "size": SIZES,
    }[example.kind]
    finding = next((name for name in FINDINGS if name in example.question), None)
    return [say(example.kind, value, study, finding) for value in values]


def _abnormal(phantom: Phantom) -> Iterator[Phantom]:
    study = STUDIES[phantom.study]
    for facts in itertools.product(study.findings, SIDES, SIZES, LOCATIONS[study.organ]):
        yield Phantom(phantom.seed, study.name, *facts)


def _photograph(phantom: Phantom) -> tuple[str, Image.Image]:
    prepared = prepare(photograph(phantom), limits=Limits())
    return prepared.image.digest, Image.open(io.BytesIO(prepared.png))
