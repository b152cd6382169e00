"""The simulated hospital: whose images are asked about, and a reviewer who knows the truth.

Its traffic has the mix `TRAFFIC`: neither the skew the model was trained on nor the balance it is tested on.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydicom.data import get_testdata_file

from hscr.client import Client
from hscr.errors import NotFound
from hscr.models.phantom.anatomy import photograph
from hscr.models.phantom.data import TRAFFIC, Example, sample_examples
from hscr.models.phantom.language import parse_answer
from hscr.records import Answer, Verdict

CLIENTS = 4


@dataclass(frozen=True)
class Judged:
    """One question asked through the gateway, and whether the reviewer accepted its answer."""

    example: Example
    answer: Answer
    right: bool


def traffic(images: int, questions_per_image: int, seed: int) -> list[Example]:
    return list(sample_examples(TRAFFIC, "traffic", images, seed, questions_per_image))


def rounds(
    asking: Client, reviewing: Client, examples: Sequence[Example], on_done: Callable[[Judged], None]
) -> list[Judged]:
    """Ask every question; accept the right answers and correct the wrong ones, each under its own key."""

    def one(example: Example) -> Judged:
        study = f"phantom-{example.phantom.seed}"
        answer = asking.ask(photograph(example.phantom), example.question, study=study)
        right = is_right(example, answer.text)
        verdict = Verdict.ACCEPT if right else Verdict.CORRECT
        reviewing.feedback(answer.id, verdict, correction=None if right else example.answer)
        judged = Judged(example, answer, right)
        on_done(judged)
        return judged

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(one, examples))


def is_right(example: Example, text: str) -> bool:
    """Whether an answer says what the true one says, whatever its words."""
    said = parse_answer(example.kind, text)
    return said is not None and said == parse_answer(example.kind, example.answer)


def real_images() -> Iterator[tuple[str, bytes, str]]:
    """(what it is, bytes, a question): published DICOM test files, and radiographs where HSCR_DATA is set."""
    for name, what in (
        ("RG1_UNCR.dcm", "a chest radiograph (DICOM)"),
        ("CT_small.dcm", "a CT slice (DICOM)"),
    ):
        path = get_testdata_file(name, download=False)
        if path is None:
            raise NotFound(f"The test file {name} is missing.", remedy="Install the package pydicom-data.")
        yield what, Path(str(path)).read_bytes(), "Is there any abnormality?"
    pictures = sorted(
        (Path(os.environ.get("HSCR_DATA", "/nonexistent")) / "vqa_rad" / "images").glob("*.jpg")
    )
    for picture in pictures[:1]:
        yield f"VQA-RAD's {picture.name} (JPEG)", picture.read_bytes(), "Is there any abnormality?"
