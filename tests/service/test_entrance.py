"""What every request passes, on both databases and by both ways: the same answers and the same rows."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
from sqlalchemy import select, text

from hscr.errors import Conflict, DatabaseUnavailable, IdempotencyConflict, StoreReadOnly
from hscr.records import Job, JobKind, Role
from hscr.store.jobs import Asked, submit_in
from hscr.store.keys import claim_idempotency
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from hscr.store.tables import idempotency_keys, job_events, jobs, outbox
from service.entrance import ByLines, ByThreads, Entrance, entrance
from service.threads import Threads
from tests.waiting import wait_until

T = TypeVar("T")

WAYS = {
    "threads-sqlite": ByThreads,
    "threads-postgresql": ByThreads,
    "lines-postgresql": ByLines,
}
on_a_server = pytest.mark.parametrize("way", [way for way in WAYS if way.endswith("postgresql")])


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def settings(settings, way, request) -> StoreSettings:
    if way.endswith("sqlite"):
        return settings
    return StoreSettings(home=settings.home, database_url=request.getfixturevalue("postgres").migrated())


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads(4, "test")
    yield made
    made.close()


@pytest.fixture
def through(way, store, threads) -> Callable[[Callable[[Entrance], Awaitable[T]]], T]:
    """Runs what is asked of an entrance, which is closed afterwards."""

    def run(asking: Callable[[Entrance], Awaitable[T]]) -> T:
        async def whole() -> T:
            door = WAYS[way](store, threads)
            try:
                return await asking(door)
            finally:
                await door.close()

        return asyncio.run(whole())

    return run


def job(**values) -> Job:
    return Job(kind=JobKind.GENERATE, key_id="key_1", **values)


def rows(store: Store, table) -> list[dict]:
    with store.database.read() as connection:
        return [
            dict(row) for row in connection.execute(select(table).order_by(*table.primary_key)).mappings()
        ]


def test_each_database_has_its_own_way(store, threads, way):
    assert isinstance(entrance(store, threads), ByThreads if way.endswith("sqlite") else ByLines)


def test_live_keys_are_known_and_others_are_not(store, through):
    made, secret = store.keys.create("a", Role.REVIEWER, project="p", train_consent=True)
    other, second = store.keys.create("b", Role.CLIENT)
    gone, revoked = store.keys.create("c", Role.CLIENT)
    store.keys.revoke(gone.id)
    secrets = [second, "hscr_sk_unknown", secret, revoked, secret, ""]
    answers = through(lambda door: door.verify_all(secrets))
    assert answers == [other, None, made, None, made, None]
    assert answers == store.keys.verify_all(secrets)
    assert answers[2].created_at.utcoffset() == made.created_at.utcoffset()


def test_a_key_is_known_until_it_is_revoked(store, through):
    key, secret = store.keys.create("a", Role.CLIENT)

    async def asking(door):
        before = await door.verify_all([secret])
        await asyncio.to_thread(store.keys.revoke, key.id)
        return before, await door.verify_all([secret])

    assert through(asking) == ([key], [None])


PAYLOADS = [
    {},
    {
        "source_ids": ["a", "b"],
        "config": {"rate": 0.7, "seeds": [1, 2], "none": None, "deep": {"true": True}},
    },
    {"text": "'\"\\ %s %(asked)s {} \n\t é 漢 😀"},
    {"nul": "\x00", "lone": "\ud800"},
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=["empty", "nested", "quotes", "nul"])
def test_a_job_is_kept_as_the_store_itself_keeps_one(store, through, payload):
    asked = job(payload=payload, parent="job_before")
    assert through(lambda door: door.submit_all([Asked(asked, ("key", "d" * 64))])) == [asked]
    by_store = store.jobs.submit(job(payload=payload, parent="job_before"), idempotency=("other", "d" * 64))

    assert store.jobs.get(asked.id) == asked
    assert [event.data for event in store.jobs.events(asked.id)] == [{"state": "queued"}]
    assert [entry[1:] for entry in store.jobs.due()] == [
        (each.id, JobKind.GENERATE) for each in (asked, by_store)
    ]
    of_a_job = {"id", "job_id", "resource", "key"}  # and the moment, which is another
    for table in (jobs, outbox, job_events, idempotency_keys):
        mine, its = [
            {name: value for name, value in row.items() if name not in of_a_job and name != "created_at"}
            for row in sorted(rows(store, table), key=lambda row: row["created_at"])
        ]
        assert mine == its
    assert [row["created_at"] for row in rows(store, jobs) if row["id"] == asked.id] == [asked.created_at]


def test_many_are_due_in_the_order_they_were_asked_in(store, through):
    asked = [Asked(job(), (f"key-{number:03}", "d")) for number in range(64)][::-1]
    assert through(lambda door: door.submit_all(asked)) == [each.job for each in asked]
    assert [entry[1] for entry in store.jobs.due()] == [each.job.id for each in asked]


def test_a_repeated_request_gets_its_first_job_among_new_ones(store, through):
    first, second = job(), job()
    store.jobs.submit(first, idempotency=("key", "digest"))
    asked = [
        Asked(second),
        Asked(job(), ("key", "digest")),
        Asked(job(), ("key", "another")),
        Asked(job(), ("twice", "digest")),
        Asked(job(), ("twice", "digest")),
    ]
    outcomes = through(lambda door: door.submit_all(asked))
    conflict = outcomes.pop(2)
    assert isinstance(conflict, IdempotencyConflict)
    assert outcomes[:2] == [second, first]
    assert outcomes[2] == outcomes[3]
    assert outcomes[2] in (asked[3].job, asked[4].job)
    assert {each.id for each in store.jobs.page()} == {each.id for each in outcomes}


def test_two_keys_do_not_share_their_idempotency_keys(store, through):
    mine, others = job(), job().but(key_id="key_2")
    asked = [Asked(mine, ("key", "digest")), Asked(others, ("key", "another"))]
    assert through(lambda door: door.submit_all(asked)) == [mine, others]


def test_of_what_cannot_be_kept_nothing_is(store, through):
    with pytest.raises(Conflict, match="200"):
        through(lambda door: door.submit_all([Asked(job()), Asked(job(), ("k" * 201, "d"))]))
    assert [rows(store, table) for table in (jobs, outbox, job_events, idempotency_keys)] == [[], [], [], []]


@on_a_server
def test_who_gets_the_same_in_opposite_order_does_not_wait_for_each_other(way, store, threads):
    first, keys = job(), [f"key-{number:02}" for number in range(60)]

    async def submitted(order: int) -> list[Job]:
        door = WAYS[way](store, threads)
        try:
            return list(await door.submit_all([Asked(job(), (key, "digest")) for key in keys[::order]]))[
                ::order
            ]
        finally:
            await door.close()

    async def both() -> list[list[Job]]:
        return await asyncio.gather(submitted(1), submitted(-1))

    with ThreadPoolExecutor(1) as pool:
        with store.database.write() as connection:
            # Whoever takes them in another order has half of them by now, and needs the other's half.
            assert claim_idempotency(connection, first.key_id, keys[30], "digest", first.id) is None
            submit_in(connection, first)
            begun = pool.submit(asyncio.run, both())
            wait_until(lambda: begun.done() or waiting(store) == 2, what="both waiting for a key")
        one, other = begun.result()
    assert one == other
    assert one[30] == first
    assert {each.id for each in store.jobs.page(limit=200)} == {each.id for each in one}


def waiting(store: Store) -> int:
    of_locks = "wait_event_type = 'Lock' AND datname = current_database()"
    with store.database.look() as connection:
        return connection.execute(
            text(f"SELECT count(*) FROM pg_stat_activity WHERE {of_locks}")
        ).scalar_one()


@on_a_server
def test_a_restart_between_two_requests_is_not_noticed(store, through, postgres):
    key, secret = store.keys.create("a", Role.CLIENT)

    async def asking(door):
        await door.verify_all([secret])
        await door.submit_all([Asked(job())])
        await asyncio.to_thread(postgres.restart)
        return await door.verify_all([secret]), await door.submit_all([Asked(job())])

    keys, kept = through(asking)
    assert keys == [key]
    assert len(store.jobs.page()) == 2
    assert kept[0] in store.jobs.page()


@on_a_server
def test_one_that_is_away_is_an_error_until_it_is_back(store, through, postgres):
    key, secret = store.keys.create("a", Role.CLIENT)

    async def asking(door):
        await door.verify_all([secret])
        await asyncio.to_thread(postgres.kill)
        try:
            for _ in range(2):
                with pytest.raises(DatabaseUnavailable):
                    await door.verify_all([secret])
                with pytest.raises(DatabaseUnavailable):
                    await door.submit_all([Asked(job())])
        finally:
            await asyncio.to_thread(postgres.start)
        return await door.verify_all([secret]), await door.submit_all([Asked(job())])

    keys, kept = through(asking)
    assert keys == [key]
    assert [each.id for each in store.jobs.page()] == [kept[0].id]


@on_a_server
def test_one_that_takes_nothing_says_so(store, through, postgres):
    name = store.database.url.database
    postgres.query(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    postgres.restart()  # it counts for new connections
    with pytest.raises(StoreReadOnly):
        through(lambda door: door.submit_all([Asked(job())]))
