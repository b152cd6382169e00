"""A gateway on PostgreSQL, whose server goes away and comes back while an answer is streamed."""

import json

import pytest

from hscr.store.settings import StoreSettings
from tests.postgres_server import PASSWORD
from tests.service.conftest import equip, standing_still
from tests.service.test_streams import LONG
from tests.waiting import wait_until


@pytest.fixture
def settings(tmp_path, postgres):
    return StoreSettings(home=tmp_path / "home", database_url=postgres.migrated())


@pytest.fixture
def on_postgres(serve, store, engine, settings):
    equip(store, engine)
    return serve(database_url=settings.database_url)


def test_an_answer_survives_a_restart_of_the_database(on_postgres, store, engine, postgres):
    with on_postgres.stream("/v1/vqa", LONG) as events:
        assert next(events)[0] == "delta"
        with standing_still(engine.process):
            postgres.kill()
            postgres.start()
        event, data, _ = list(events)[-1]
    assert event == "answer"
    assert [answer.id for answer in store.answers.page()] == [json.loads(data)["id"]]


def test_an_answer_that_cannot_be_kept_ends_with_an_error_and_the_gateway_recovers(
    on_postgres, store, engine, postgres, capfd
):
    with on_postgres.stream("/v1/vqa", LONG) as events:
        assert next(events)[0] == "delta"
        with standing_still(engine.process):
            postgres.kill()
        told = list(events)
    event, data, _ = told[-1]
    problem = json.loads(data)
    assert (event, problem["type"], problem["status"]) == ("error", "/problems/database-unavailable", 503)
    assert "hscr doctor" in problem["remedy"]

    refused = on_postgres.ask()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")

    postgres.start()
    wait_until(lambda: on_postgres.ask().status_code == 200, seconds=90, what="the gateway serving again")
    assert len(store.answers.page()) == 1
    logged = "".join(capfd.readouterr())
    assert PASSWORD not in logged + data + refused.text
