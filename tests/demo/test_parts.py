"""The demo's own judgements: who said what, and what counts as failed."""

from collections import Counter

from hscr.demo.swap import NEITHER, NEW, OLD, Streams, Telling
from hscr.demo.ward import is_right, real_images, traffic
from hscr.imaging.decode import prepare
from hscr.imaging.guard import Limits
from hscr.models.phantom.data import Example


def example(kind: str = "side") -> Example:
    return next(found for found in traffic(30, 9, seed=0) if found.kind == kind)


def test_a_version_is_told_by_its_text_alone() -> None:
    question = Telling(example(), old="On the left.", new="On the right.")
    said = [question.version(text) for text in ("On the left.", "On the right.", "On the rleft.")]
    assert said == [OLD, NEW, NEITHER]


def test_mixed_answers_broken_streams_and_wrong_provenance_all_fail() -> None:
    streams = Streams("http://127.0.0.1:9", "key", [])
    streams.versions = Counter({OLD: 5, NEW: 3, NEITHER: 2})
    streams.failures = ["engine-interrupted"]
    streams.contradictions = 1
    assert (streams.requests, streams.failed) == (11, 4)


def test_the_reviewer_accepts_other_words_and_corrects_other_facts() -> None:
    asked = example("abnormal")
    assert is_right(asked, asked.answer)
    flipped = "No" if asked.truth_class == "yes" else "Yes"
    assert not is_right(asked, f"{flipped}, this study is {'normal' if flipped == 'No' else 'abnormal'}.")
    assert not is_right(asked, "abnormal this yes")


def test_the_real_images_are_real_dicom() -> None:
    kinds = [prepare(data, limits=Limits()).image.media_type for _, data, _ in real_images()]
    assert kinds[:2] == ["application/dicom"] * 2


def test_the_wards_traffic_is_the_same_each_time() -> None:
    assert [found.id for found in traffic(5, 3, seed=1)] == [found.id for found in traffic(5, 3, seed=1)]
