"""Keys with a given secret: made once, whoever asks and however often."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from hscr.errors import Conflict, InvalidInput
from hscr.records import Role
from hscr.store.store import Store

FIRST = f"hscr_sk_{'a' * 43}"
SECOND = f"hscr_sk_{'b' * 64}"


def test_it_is_made_once_and_works(store: Store) -> None:
    made, changed = store.keys.ensure("first", Role.OPERATOR, FIRST, project="ward")
    assert changed
    assert store.keys.verify(FIRST) == made
    assert store.keys.ensure("first", Role.OPERATOR, FIRST, project="ward") == (made, False)
    assert store.keys.page() == [made]


def test_a_secret_of_create_is_one_that_can_be_ensured(store: Store) -> None:
    key, secret = store.keys.create("ward 3", Role.REVIEWER, train_consent=True)
    assert store.keys.ensure("ward 3", Role.REVIEWER, secret, train_consent=True) == (key, False)


@pytest.mark.parametrize(
    "secret", ["", "a" * 51, f"hscr_sk_{'a' * 42}", f"hscr_sk_{'a' * 43} ", f"hscr_sk_{'ä' * 43}"]
)
def test_a_secret_that_could_be_guessed_or_sent_wrongly_is_refused(store: Store, secret: str) -> None:
    with pytest.raises(InvalidInput, match="openssl rand -hex 32"):
        store.keys.ensure("first", Role.OPERATOR, secret)
    assert store.keys.page() == []


@pytest.mark.parametrize(
    ("secret", "terms"),
    [
        (SECOND, {}),
        (FIRST, {"role": Role.CLIENT}),
        (FIRST, {"project": "other"}),
        (FIRST, {"train_consent": True}),
    ],
    ids=["secret", "role", "project", "consent"],
)
def test_a_name_in_use_is_only_taken_over_when_told_so(store: Store, secret: str, terms: dict) -> None:
    before, _ = store.keys.ensure("first", Role.OPERATOR, FIRST)
    wanted = {"role": Role.OPERATOR, "secret": secret, **terms}
    with pytest.raises(Conflict, match="--replace"):
        store.keys.ensure("first", **wanted)
    assert store.keys.page() == [before]

    after, changed = store.keys.ensure("first", **wanted, replace=True)
    assert changed
    assert store.keys.verify(secret) == after
    assert [key for key in store.keys.page() if key.revoked_at is None] == [after]
    assert (store.keys.verify(FIRST) is None) == (secret == SECOND)
    assert store.keys.ensure("first", **wanted, replace=True) == (after, False)


def test_what_a_person_revoked_stays_so(store: Store) -> None:
    key, _ = store.keys.ensure("first", Role.OPERATOR, FIRST)
    store.keys.revoke(key.id)
    for replace in (False, True):
        found, changed = store.keys.ensure("first", Role.OPERATOR, FIRST, replace=replace)
        assert found.revoked_at is not None
        assert not changed
        with pytest.raises(Conflict, match="is revoked"):
            store.keys.ensure("first", Role.CLIENT, FIRST, replace=replace)
    assert store.keys.verify(FIRST) is None
    assert store.keys.ensure("first", Role.OPERATOR, SECOND)[1], "its name is free again"


def test_a_secret_belongs_to_one_name(store: Store) -> None:
    key, _ = store.keys.ensure("first", Role.OPERATOR, FIRST)
    with pytest.raises(Conflict, match="has another name"):
        store.keys.ensure("second", Role.OPERATOR, FIRST, replace=True)
    assert store.keys.page() == [key]


def test_of_many_at_once_one_makes_it(store: Store) -> None:
    together = Barrier(6, timeout=60)

    def ensure(number: int) -> list[bool | None]:
        """For each name whether this thread made its key, or None where another secret was first."""
        outcomes: list[bool | None] = []
        for name in map(str, range(12)):
            together.wait()
            try:
                secret = f"hscr_sk_{name}-{'ab'[number % 2] * 43}"
                outcomes.append(store.keys.ensure(name, Role.OPERATOR, secret)[1])
            except Conflict:
                outcomes.append(None)
        return outcomes

    with ThreadPoolExecutor(together.parties) as pool:
        by_name = zip(*pool.map(ensure, range(together.parties)), strict=True)
    for outcomes in by_name:
        assert sorted(map(str, outcomes)) == ["False", "False", "None", "None", "None", "True"]
    assert len(store.keys.page()) == 12
