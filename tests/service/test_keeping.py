"""What the gateway keeps, forgets, and does when it can keep nothing: deletions, expiry, a full disk."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from hscr.records import Role
from hscr.store.check import Findings, keep_findings
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from tests.full_disk import small_disk
from tests.service.conftest import IMAGE, b64, replica, serving
from tests.service.scripted import Exchange, ScriptedEngine, agrees, scripted
from tests.stored import images_in
from tests.waiting import wait_until
from workers.broker import build
from workers.gpu import Gpu
from workers.services import Services
from workers.settings import WorkerSettings
from workers.sweep import sweep

ROWS = {"rows": [{"image": b64(IMAGE), "question": "is it?", "answer": "no.", "study": "s"}], "consent": True}


@pytest.fixture
def scripted_engine(store: Store) -> Iterator[ScriptedEngine]:
    with scripted() as engine:
        store.releases.report_replica(replica(engine.address))
        yield engine


@pytest.fixture
def gateway(serve, scripted_engine):
    return serve(min_free_bytes=0)


def test_a_deleted_study_is_forgotten_and_its_tombstone_is_told(gateway, store):
    reviewer, operator = (gateway.key(role, train_consent=True) for role in (Role.REVIEWER, Role.OPERATOR))
    asked = gateway.ask(headers=reviewer, study="s-1").json()
    assert gateway.get("/v1/studies/s-1", headers=operator).status_code == 404
    gone = gateway.request("DELETE", "/v1/studies/s-1", headers=operator).json()
    assert gone == {"study": "s-1", "images_deleted": 1, "adapters_trained_on_it": []}
    told = gateway.get("/v1/studies/s-1", headers=operator).json()
    assert (told["study"], told["adapters"]) == ("s-1", [])
    assert gateway.get("/v1/studies/s-1", headers=reviewer).status_code == 403
    assert gateway.get("/v1/answers", headers=reviewer).json()["data"] == []
    assert gateway.get(f"/v1/answers/{asked['id']}", headers=reviewer).status_code == 410
    refused = gateway.ask(headers=reviewer, study="s-1")
    assert (refused.status_code, refused.json()["type"]) == (410, "/problems/gone")
    assert "another name" in refused.json()["remedy"]


def test_an_expired_image_takes_no_score_and_its_answer_stays(serve, scripted_engine, settings, store):
    gateway = serve(min_free_bytes=0, image_ttl_hours=1e-6)
    answer = gateway.answered(study="s-1")
    worker = WorkerSettings(home=settings.home)
    services, app = Services(worker, store, Gpu(worker)), build(worker)

    def expired() -> bool:
        sweep(services, app)
        return not store.blobs.exists(answer.image.digest)

    wait_until(expired, what="the expiry")
    refused = gateway.post(f"/v1/answers/{answer.id}/visual-dependence")
    assert (refused.status_code, refused.json()["type"]) == (410, "/problems/gone")
    assert "expired" in refused.json()["detail"]
    told = gateway.get(f"/v1/answers/{answer.id}/lineage").json()
    assert told["image_stored"] is False
    assert told["answer"]["provenance"] == answer.provenance.model_dump(mode="json")


def test_an_image_of_two_studies_stays_while_questions_and_deletions_meet(gateway, store):
    gateway.answered(study="s-0")
    with ThreadPoolExecutor(2) as clients:
        for number in range(10):
            deleted = clients.submit(gateway.request, "DELETE", f"/v1/studies/s-{number}")
            asked = clients.submit(gateway.answered, study=f"s-{number + 1}")
            assert deleted.result().status_code == 200
            digest = asked.result().image.digest
            assert store.blobs.exists(digest), f"lost in round {number}"
    assert gateway.request("DELETE", "/v1/studies/s-10").json()["images_deleted"] == 1
    assert images_in(store) == set()


def test_what_the_store_check_missed_is_a_metric(gateway, store):
    assert gateway.metric("hscr_store_lost_files") == 0
    keep_findings(store, Findings(lost_images=("a", "b"), lost_adapters=("x@1",)))
    assert gateway.metric("hscr_store_lost_files", kind="image") == 2
    assert gateway.metric("hscr_store_lost_files", kind="adapter") == 1


class Filled:
    """A gateway whose state is on a disk that can be filled."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.disk = stack.enter_context(small_disk(folder, megabytes=6))
        settings = StoreSettings(home=folder / "home", min_free_bytes=200_000)
        migrate(settings)
        self.store = stack.enter_context(Store.open(settings))
        self.engine = stack.enter_context(scripted())
        self.store.releases.report_replica(replica(self.engine.address))
        self.gateway = stack.enter_context(serving(settings, self.store, min_free_bytes=200_000))

    def ready(self) -> bool:
        return self.gateway.get("/readyz").status_code == 200


def migrate(settings: StoreSettings) -> None:
    from hscr.store.database import Database

    database = Database(settings.database)
    database.upgrade()
    database.close()


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    with ExitStack() as stack:
        yield Filled(tmp_path / "disk", stack)


def test_on_a_full_disk_no_engine_is_asked_and_all_goes_on_by_itself(filled):
    gateway, engine = filled.gateway, filled.engine
    kept = gateway.answered(study="s-1")
    assert gateway.metric("hscr_store_writable") == 1
    with filled.disk.full():
        wait_until(lambda: not filled.ready(), what="the gateway's notice")
        asked = len(engine.exchanges)
        for refused in (gateway.ask(), gateway.get("/readyz"), gateway.post("/v1/preference-jobs", ROWS)):
            assert (refused.status_code, refused.json()["type"]) == (507, "/problems/store-full"), (
                refused.text
            )
            assert "Free some space" in refused.json()["remedy"]
            assert refused.headers["retry-after"] == "30"
        assert len(engine.exchanges) == asked
        assert gateway.metric("hscr_store_writable") == 0
        assert gateway.get(f"/v1/answers/{kept.id}").json()["text"] == kept.text
    wait_until(filled.ready, what="readiness by itself")
    assert gateway.answered(study="s-2").image.digest == kept.image.digest
    assert gateway.post("/v1/preference-jobs", ROWS).status_code == 202
    assert len(filled.store.answers.page()) == 2
    assert len(filled.store.jobs.page()) == 1


def test_a_disk_that_fills_while_the_engine_answers_gives_no_answer_that_is_not_kept(filled):
    """The last moment before the commit: whole and streamed."""
    gateway, stack = filled.gateway, ExitStack()

    async def fills(exchange: Exchange) -> None:
        stack.enter_context(filled.disk.full())
        await agrees(exchange)

    filled.engine.script = fills
    refused = gateway.ask()
    stack.close()
    assert (refused.status_code, refused.json()["type"]) == (507, "/problems/store-full")
    wait_until(filled.ready, what="readiness")
    with gateway.stream("/v1/vqa", {"image": b64(IMAGE), "question": "is it?"}) as events:
        told = [(kind, data) for kind, data, _ in events]
    stack.close()
    assert [kind for kind, _ in told] == ["delta", "error"]
    assert "store-full" in told[-1][1]
    assert filled.store.answers.page() == []
    filled.engine.script = agrees
    wait_until(filled.ready, what="readiness")
    assert gateway.ask().status_code == 200


def test_with_bytes_on_a_read_only_disk_nothing_is_asked(settings, store, scripted_engine):
    disk = small_disk(settings.blobs, megabytes=1)
    with disk as blobs, serving(settings, store, min_free_bytes=0) as gateway:
        with blobs.read_only():
            wait_until(lambda: gateway.get("/readyz").status_code == 503, what="the gateway's notice")
            refused = gateway.ask()
            assert (refused.status_code, refused.json()["type"]) == (503, "/problems/store-read-only")
            assert scripted_engine.exchanges == []
        wait_until(lambda: gateway.get("/readyz").status_code == 200, what="readiness by itself")
        assert gateway.ask().status_code == 200
