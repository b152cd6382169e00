"""What can be asked about a phantom, how it is answered, and the grammar that reads answers back.

Answers follow one frame for each kind of question, so that a wrong word is a wrong fact. The parser accepts
that frame and the bare fact ("left", "a nodule"), in any case; anything else is not in the grammar. Of an
answer to a closed question the first word counts, whatever follows, as closed questions are scored elsewhere.
"""

import re
from dataclasses import dataclass

from hscr.models.phantom.anatomy import FINDINGS, LOCATIONS, SIDES, SIZES, STUDIES, Phantom, Study

KINDS = ("modality", "organ", "abnormal", "presence", "finding", "side", "location", "size", "caption")
"""Every kind of question; the last asks for a caption."""
NEEDS_FINDING = ("side", "location", "size")
NORMAL = "normal"
"""Truth class of `finding` and `caption` where there is nothing to find."""

QUESTIONS = {
    "modality": (
        "Which imaging modality is this?",
        "What type of scan is shown?",
        "How was this image acquired?",
        "What modality was used to take this image?",
    ),
    "organ": (
        "Which organ is shown?",
        "What part of the body does this image show?",
        "Which organ system is being examined?",
        "What anatomy is pictured here?",
    ),
    "abnormal": (
        "Is this study abnormal?",
        "Does this image show any abnormality?",
        "Is there anything abnormal in this image?",
        "Is there evidence of disease?",
    ),
    "presence": (
        "Is there a {finding}?",
        "Does this image show a {finding}?",
        "Can a {finding} be seen?",
        "Is a {finding} present in this study?",
    ),
    "finding": (
        "What abnormality is seen?",
        "What is the main finding?",
        "Which abnormality does this image show?",
        "What is the most likely diagnosis?",
    ),
    "side": (
        "Which side is the abnormality on?",
        "Is the abnormality on the left or the right?",
        "On what side is the lesion located?",
        "Which side of the patient is affected?",
    ),
    "location": (
        "Where is the abnormality located?",
        "Where in the image is the lesion?",
        "What is the location of the abnormality?",
        "Which region is affected?",
    ),
    "size": (
        "How large is the abnormality?",
        "Is the abnormality small or large?",
        "What size is the lesion?",
        "How big is the lesion?",
    ),
    "caption": (
        "Describe this image.",
        "Write a caption for this image.",
        "Give a short report of this study.",
        "Summarize the findings in this image.",
    ),
}
"""Paraphrases of each kind; `presence` names the finding it asks for."""

REGIONS = {"lungs": "zone", "kidneys": "third", "brain": "lobe"}
MODALITIES = tuple(sorted({study.modality for study in STUDIES.values()}))
ORGANS = tuple(REGIONS)
_PLACES = tuple(sorted({place for places in LOCATIONS.values() for place in places}))


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def question(kind: str, paraphrase: int, asked: str | None = None) -> str:
    """The question's text; `asked` is the finding that a `presence` question names."""
    template = QUESTIONS[kind][paraphrase]
    return template.replace("a {finding}", _article(asked)) if asked is not None else template


def truth(kind: str, phantom: Phantom, asked: str | None = None) -> str:
    """The canonical right answer, which is also the truth class that scores are macro-averaged over.

    Raises:
        ValueError: the kind needs a finding and the phantom has none.
    """
    if kind in NEEDS_FINDING and phantom.finding is None:
        raise ValueError(f"a {kind} question needs a phantom with a finding; choose another kind")
    return _truths(phantom, asked)[kind]


def _truths(phantom: Phantom, asked: str | None) -> dict[str, str]:
    study = STUDIES[phantom.study]
    return {
        "modality": study.modality,
        "organ": study.organ,
        "abnormal": "no" if phantom.finding is None else "yes",
        "presence": "yes" if phantom.finding == asked else "no",
        "finding": phantom.finding or NORMAL,
        "side": str(phantom.side),
        "location": f"{phantom.side} {phantom.location}",
        "size": str(phantom.size),
        "caption": phantom.finding or NORMAL,
    }


def answer(kind: str, phantom: Phantom, asked: str | None = None) -> str:
    """The right answer as a sentence."""
    if kind == "caption":
        return caption(phantom)
    return say(kind, truth(kind, phantom, asked), STUDIES[phantom.study], asked)


def say(kind: str, value: str, study: Study, asked: str | None = None) -> str:
    """The sentence of the grammar that gives `value` (canonical) to a question of this kind."""
    if kind == "presence":
        assert asked is not None
        return f"Yes, there is {_article(asked)}." if value == "yes" else f"No, there is no {asked}."
    sentences = {
        "modality": f"This is {_article(value)} image.",
        "organ": f"This image shows the {value}.",
        "abnormal": "Yes, this study is abnormal." if value == "yes" else "No, this study is normal.",
        "finding": "There is no abnormality." if value == NORMAL else f"There is {_article(value)}.",
        "side": f"It is on the {value} side.",
        "location": f"It is in the {value} {REGIONS[study.organ]}.",
        "size": f"It is {value}.",
    }
    return sentences[kind]


def caption(phantom: Phantom) -> str:
    """One sentence with every fact of the phantom."""
    study = STUDIES[phantom.study]
    name = study.name[0].upper() + study.name[1:]
    if phantom.finding is None:
        return f"{name} without abnormality."
    place = f"{phantom.side} {phantom.location} {REGIONS[study.organ]}"
    return f"{name} with a {phantom.size} {phantom.finding} in the {place}."


def _any(words: tuple[str, ...]) -> str:
    return "|".join(re.escape(word) for word in words)


_FINDING, _SIDE, _SIZE = _any(FINDINGS), _any(SIDES), _any(SIZES)
_PLACE, _REGION = _any(_PLACES), _any(tuple(REGIONS.values()))
_ANSWERS = {
    "modality": rf"(?:this is an? )?({_any(MODALITIES)})(?: image)?",
    "organ": rf"(?:this image shows )?(?:the )?({_any(ORGANS)})",
    "abnormal": r"(yes|no)(?:, this study is (?:ab)?normal)?",
    "presence": rf"(yes|no)(?:, there is (?:an?|no) (?:{_FINDING}))?",
    "finding": rf"(?:there is )?(?:an? )?({_FINDING})|(?:there is )?(no abnormality|{NORMAL})",
    "side": rf"(?:it is )?(?:on )?(?:the )?({_SIDE})(?: side)?",
    "location": rf"(?:it is in )?(?:the )?((?:{_SIDE}) (?:{_PLACE}))(?: (?:{_REGION}))?",
    "size": rf"(?:it is )?({_SIZE})",
}
_CAPTION = re.compile(
    rf"(?P<study>{_any(tuple(STUDIES))})(?: without abnormality|"
    rf" with an? (?P<size>{_SIZE}) (?P<finding>{_FINDING})"
    rf" in the (?P<side>{_SIDE}) (?P<location>{_PLACE}) (?:{_REGION}))",
    re.IGNORECASE,
)
_PARSERS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in _ANSWERS.items()}
_CANONICAL = {word.lower(): word for word in MODALITIES} | {"no abnormality": NORMAL}
_STUDY_NAMES = {name.lower(): name for name in STUDIES}


@dataclass(frozen=True)
class CaptionFacts:
    """What a caption claims. `finding` and its attributes are `None` when it claims that there is none."""

    study: str
    finding: str | None = None
    side: str | None = None
    size: str | None = None
    location: str | None = None

    @classmethod
    def of(cls, phantom: Phantom) -> "CaptionFacts":
        """What a right caption of this phantom claims."""
        return cls(phantom.study, phantom.finding, phantom.side, phantom.size, phantom.location)


def _sentence(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").strip()


def parse_answer(kind: str, text: str) -> str | None:
    """The canonical value an answer gives, or `None` where it is not in the grammar.

    A caption's value is the finding it names, or `NORMAL`.
    """
    if kind == "caption":
        facts = parse_caption(text)
        return None if facts is None else facts.finding or NORMAL
    match = _PARSERS[kind].fullmatch(_sentence(text))
    if match is None:
        return None
    value = next(group for group in match.groups() if group is not None).lower()
    return _CANONICAL.get(value, value)


def parse_caption(text: str) -> CaptionFacts | None:
    """Every fact a caption claims, or `None` where it is not in the grammar."""
    match = _CAPTION.fullmatch(_sentence(text))
    if match is None:
        return None
    facts = {name: value and value.lower() for name, value in match.groupdict().items()}
    return CaptionFacts(_STUDY_NAMES[str(facts.pop("study"))], **facts)


def caption_errors(text: str, phantom: Phantom) -> tuple[bool, bool]:
    """(hallucinated, omitted): the caption names a finding that is not there; it misses the one that is.

    A caption outside the grammar names every finding whose word it contains.
    """
    facts = parse_caption(text)
    named = {facts.finding} - {None} if facts else {word for word in FINDINGS if word in text.lower()}
    real = {phantom.finding} - {None}
    return bool(named - real), bool(real - named)
