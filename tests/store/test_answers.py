"""Answers, feedback that becomes training material, and images that expire."""

from datetime import timedelta

import pytest

from hscr.errors import Gone, NotFound
from hscr.records import Feedback, Verdict
from hscr.store.store import Store
from tests.store.make import answer, source


def judge(
    store: Store, verdict: Verdict, correction: str | None = None, *, trainable: bool = True
) -> Feedback:
    given = Feedback(answer_id="ans_1", verdict=verdict, correction=correction, trainable=trainable)
    store.answers.judge(given)
    return given


@pytest.fixture
def asked(store: Store) -> Store:
    store.answers.add(answer("ans_1"), image_ttl=timedelta(hours=24))
    return store


def test_a_correction_becomes_a_source_whose_chosen_answer_is_the_correction(asked: Store) -> None:
    given = judge(asked, Verdict.CORRECT, "yes, on the left.")
    (pending,) = asked.preferences.pending("config")
    assert (pending.id, pending.chosen) == (given.id, "yes, on the left.")


def test_an_accepted_answer_becomes_its_own_chosen_answer(asked: Store) -> None:
    judge(asked, Verdict.ACCEPT)
    assert [row.chosen for row in asked.preferences.pending("config")] == ["no."]


def test_a_rejection_alone_trains_nothing(asked: Store) -> None:
    judge(asked, Verdict.REJECT)
    assert asked.preferences.pending("config") == []
    assert len(asked.answers.feedback("ans_1")) == 1


def test_untrainable_feedback_is_kept_and_trains_nothing(asked: Store) -> None:
    judge(asked, Verdict.CORRECT, "yes.", trainable=False)
    assert asked.preferences.pending("config") == []
    assert asked.answers.feedback("ans_1")[0].correction == "yes."


def test_an_unconsented_source_is_never_pending(store: Store) -> None:
    store.preferences.add_sources([source("s1", consent=False), source("s2")])
    assert [row.id for row in store.preferences.pending("config")] == ["s2"]


def test_images_expire_unless_something_keeps_them(asked: Store) -> None:
    past = timedelta(seconds=-1)
    asked.answers.add(answer("ans_2", study="other", image=answer("x").image.but(digest="j")), image_ttl=past)
    assert asked.answers.expire_images() == ["j"]
    assert asked.answers.expire_images() == []


def test_an_image_two_studies_share_stays_while_one_holds_it(asked: Store) -> None:
    asked.answers.add(answer("ans_2", study="other"), image_ttl=timedelta(seconds=-1))
    assert asked.answers.expire_images() == [], "study `st` still holds it"


def test_consented_feedback_keeps_an_image_that_would_expire(store: Store) -> None:
    store.answers.add(answer("ans_1"), image_ttl=timedelta(seconds=-1))
    judge(store, Verdict.CORRECT, "yes.")
    assert store.answers.expire_images() == []


def test_an_answer_of_a_deleted_study_is_gone(asked: Store) -> None:
    _, unreferenced = asked.preferences.delete_study("st", "key_1")
    assert unreferenced == ["i"]
    with pytest.raises(Gone):
        asked.answers.get("ans_1")


def test_an_unknown_answer_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound):
        store.answers.get("ans_none")
