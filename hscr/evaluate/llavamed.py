"""The metrics of LLaVA-Med's VQA evaluation, quirks included, so that numbers can be compared with papers.

Source: microsoft/LLaVA-Med v1.0.0, `llava/eval/run_eval.py` and `eval_metrics/`. Recall on open and accuracy
on closed questions are what papers report. `strict_word` is ours: the same question without the substring
accidents ("abnormal" contains "no").
"""

import re
from collections import Counter

_PUNCTUATION = ';/[]"{}()=+\\_->' + "<@`,?!"
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_DIGIT_COMMA = re.compile(r"\d,\d")
_LOOSE_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_DROPPED = 32
"""The original passes re.UNICODE (32) where the count belongs."""

_ONE_APOSTROPHE = """
 ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't
we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_MORE_APOSTROPHES = """
 couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""
_ODD_ONES = {
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
}


def _contractions() -> dict[str, str]:
    # VQA's table maps spellings that lack one apostrophe (or their only one) to the full spelling.
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _MORE_APOSTROPHES.split():
        table |= {word[:at] + word[at + 1 :]: word for at, letter in enumerate(word) if letter == "'"}
    return table | _ODD_ONES


_CONTRACTIONS = _contractions()


def normalise(text: str) -> str:
    """VQA normalisation of lower-cased text. Applying it twice may change the text again; the scorers do."""
    delete_all = _DIGIT_COMMA.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if touches_space or delete_all else " ")
    stripped = _LOOSE_PERIOD.sub("", stripped, count=_PERIODS_DROPPED)
    numbered = (_NUMBERS.get(word, word) for word in stripped.lower().split())
    words = (_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)
    return " ".join(words).replace(",", "")


def open_recall(prediction: str, reference: str) -> float:
    """tp / (tp + fn) in [0, 1]; tp counts the *prediction's* words in the reference, so repeating helps."""
    said, wanted = (Counter(_twice(text).split()) for text in (prediction, reference))
    found = sum(count for word, count in said.items() if word in wanted)
    missed = sum(count for word, count in wanted.items() if word not in said)
    return found / (found + missed) if found else 0.0


def closed_llavamed_run_eval(prediction: str, reference: str) -> bool:
    """Right if the prediction contains "yes" or "no" and the reference, all as substrings."""
    said, wanted = (normalise(text.lower()) for text in (prediction, reference))
    return ("yes" in said or "no" in said) and wanted in said


def closed_strict_word(prediction: str, reference: str) -> bool:
    """Right if the first yes or no is the reference; for other references, if its words occur in one run."""
    said, wanted = (normalise(text.lower()).split() for text in (prediction, reference))
    if wanted in (["yes"], ["no"]):
        return next(([word] for word in said if word in {"yes", "no"}), None) == wanted
    return any(said[at : at + len(wanted)] == wanted for at in range(len(said) - len(wanted) + 1))


def _twice(text: str) -> str:
    return normalise(normalise(text.lower()))
