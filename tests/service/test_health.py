"""Probes, metrics, and a copy that has lost its view of the database."""

import sqlite3

from hscr.store.releases import Releases
from hscr.store.tables import answers, gateways
from tests.service.conftest import QUESTION, VERSIONS, equip
from tests.waiting import wait_until

A, _B = VERSIONS


def test_ready_needs_a_replica_that_serves_the_active_version(serve, store, engine):
    gateway = serve()
    assert gateway.get("/livez").json() == {"status": "ok"}
    assert gateway.get("/readyz").json()["type"] == "/problems/engine-unavailable"
    equip(store, engine)
    wait_until(lambda: gateway.get("/readyz").status_code == 200, what="readiness")
    gateway.serve_version(A)
    assert gateway.get("/readyz").json() == {"status": "ok", "epoch": 1, "active": A, "replicas": 1}


def test_a_copy_that_cannot_refresh_admits_nothing_until_it_can(serve, store, engine, settings):
    equip(store, engine)
    gateway = serve(pointer_stale=0.5)
    assert gateway.get("/readyz").status_code == 200
    blocker = sqlite3.connect(settings.home / "hscr.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")  # no heartbeat can be written
    wait_until(lambda: gateway.get("/readyz").status_code == 503, what="staleness")
    refused = gateway.ask()
    assert (refused.status_code, refused.json()["type"]) == (503, "/problems/pointer-stale")
    assert int(refused.headers["retry-after"]) > 0
    assert gateway.get("/livez").status_code == 200
    assert gateway.metric("hscr_pointer_age_seconds") > 0.5
    blocker.execute("ROLLBACK")
    blocker.close()
    wait_until(lambda: gateway.get("/readyz").status_code == 200, what="recovery")
    assert gateway.ask().status_code == 200


def test_a_copy_that_ends_takes_its_heartbeat_along(settings, store, engine):
    from tests.service.conftest import serving

    def copies() -> list[int]:
        with store.database.read() as connection:
            return [row.epoch for row in connection.execute(gateways.select())]

    with serving(settings, store):
        assert copies() == [Releases(store.database).pointer().epoch]
    assert copies() == []


def test_metrics_count_answers_and_say_nothing_of_patients(gateway):
    gateway.ask(study="s-secret")
    gateway.ask(question="")
    assert gateway.metric("hscr_answers_total", kind="vqa", version="base") == 1
    assert gateway.metric("hscr_requests_total", route="/v1/vqa", status="200") == 1
    assert gateway.metric("hscr_requests_total", route="/v1/vqa", status="422") == 1
    assert gateway.metric("hscr_tokens_total", direction="completion") > 0
    gateway.get("/v1/answers/ans_secret")
    gateway.get("/secret/path")
    text = gateway.get("/metrics").text
    assert QUESTION not in text
    assert "secret" not in text
    assert 'route="/v1/answers/{answer_id}"' in text


def test_two_apps_in_one_process_do_not_share_counts(serve, store, engine):
    equip(store, engine)
    one, other = serve(), serve()
    one.ask()
    assert (one.metric("hscr_answers_total"), other.metric("hscr_answers_total")) == (1, 0)


def test_what_nobody_meant_is_a_problem_without_internals(gateway, store):
    answer = gateway.answered()
    with store.database.write() as connection:
        connection.execute(answers.update().values(body={"question": "Doe^Jane?"}))
    broken = gateway.get(f"/v1/answers/{answer.id}")
    assert (broken.status_code, broken.json()["type"]) == (500, "/problems/internal-error")
    assert broken.json()["request_id"] == broken.headers["x-request-id"]
    assert not any(word in broken.text for word in ("Doe", "pydantic", "Traceback", ".py"))
    with store.database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE answers RENAME TO elsewhere")
    away = gateway.get(f"/v1/answers/{answer.id}")
    assert (away.status_code, away.json()["type"]) == (503, "/problems/database-unavailable")
    assert "SELECT" not in away.text


def test_every_problem_explains_itself(gateway):
    told = gateway.get("/problems/gate-refused").json()
    assert (told["status"], told["title"]) == (409, "The evaluation gate did not pass")
    assert gateway.get("/problems/nonsense").status_code == 404
    kinds = [gateway.get(path) for path in ("/v1/nowhere", "/v1/jobs/none")]
    assert all(gateway.get(each.json()["type"]).status_code == 200 for each in kinds)
