"""Deleting a study: only its name stays, and no order of events loses what another study needs."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest
from sqlalchemy import select

from hscr.errors import Gone, NotFound
from hscr.records import (
    AdapterVersion,
    Feedback,
    Job,
    JobKind,
    JobState,
    PreferenceRecord,
    Response,
    TokenDependence,
    Verdict,
    VisualDependence,
)
from hscr.store.answers import add_answer_dependence, hold_image
from hscr.store.check import Findings, check, keep_findings, last_findings, repair
from hscr.store.preferences import add_record, add_skip, all_live
from hscr.store.releases import add_adapter
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from hscr.store.tables import answers, metadata
from tests.store.make import answer, source
from tests.stored import images_in

PRIVATE = "Jane-Doe"
NOW = timedelta(0)


def about(digest: str, name: str = "ans_1", study: str = "st", **values: object):
    return answer(name, study=study, image=answer("x").image.but(digest=digest), **values)


def adapter(name: str = "a@111111111111", **values: object) -> AdapterVersion:
    given = {
        "name": name, "digest": name.partition("@")[2].ljust(64, "0"), "base_digest": "b", "job_id": "j",
        "config": {}, "records": 1, "records_digest": "r",
    }  # fmt: skip
    return AdapterVersion.model_validate(given | values)


def learn(store: Store, row_id: str, digest: str) -> PreferenceRecord:
    """A source's record, the adapter trained on it, and a source that nothing was made of."""
    record = PreferenceRecord(
        id="pref_1", image_digest=digest, study="st", question=PRIVATE, chosen=PRIVATE, source=row_id,
        method="hscr", rejected=(Response(text=PRIVATE, similarity=0.5, mean_probability=0.5),),
        model_digest="m", config_digest="k", consent=True,
    )  # fmt: skip
    item = {"image_digest": digest, "question": PRIVATE, "completion": PRIVATE}
    other = item | {"image_digest": "other", "question": "other?", "completion": "other."}
    with store.database.write() as connection:
        assert add_record(connection, record)
        add_skip(connection, row_id, "k2", "job", PRIVATE)
        add_adapter(connection, adapter(probe={"items": [item, other]}), [record])
    return record


def everything(store: Store) -> str:
    """All that the database holds, as text."""
    with store.database.read() as connection:
        return "\n".join(
            str(dict(row))  # a row's own text is cut short
            for table in metadata.sorted_tables
            for row in connection.execute(select(table)).mappings()
        )


def test_nothing_that_was_said_of_a_study_stays(store: Store) -> None:
    digest = store.blobs.put(b"pixels")
    asked = store.answers.add(about(digest, question=PRIVATE, text=PRIVATE), image_ttl=None)
    judged = Feedback(
        answer_id=asked.id, verdict=Verdict.CORRECT, correction=PRIVATE, comment=PRIVATE, trainable=True
    )
    store.answers.judge(judged)
    record = learn(store, judged.id, digest)
    token = TokenDependence(text=PRIVATE, content=True, full=-0.5, dropped=-1.5, difference=1.0)
    found = VisualDependence(
        answer_id=asked.id, score=1.0, tokens=(token,), dropping={}, model_digest="m", adapter=None,
        adapter_digest=None, numeric_mode="x", vision_numeric_mode="x", engine="e", job_id="j",
    )  # fmt: skip
    with store.database.write() as connection:
        add_answer_dependence(connection, found)
    assert everything(store).count(PRIVATE) >= 8

    adapters, unheld = store.preferences.delete_study("st", "key_1")

    assert (adapters, unheld) == (["a@111111111111"], [digest])
    assert PRIVATE not in everything(store)
    assert store.answers.page() == []
    assert [item["question"] for item in store.releases.adapter("a@111111111111").probe["items"]] == [
        "other?"
    ]
    with store.database.write() as connection:
        assert not add_record(connection, record), "a late worker cannot bring it back"
        add_skip(connection, judged.id, "k3", "job", PRIVATE)
        assert not all_live(connection, [record])
    assert PRIVATE not in everything(store)
    with pytest.raises(Gone):
        store.answers.add(about(digest, "ans_2", question=PRIVATE), image_ttl=None)


def test_the_provenance_of_an_answer_stays(store: Store) -> None:
    asked = store.answers.add(about("i"), image_ttl=None)
    store.preferences.delete_study("st", "key_1")
    with store.database.read() as connection:
        (body,) = connection.execute(select(answers.c.body)).scalars()
    assert body["provenance"] == asked.provenance.model_dump(mode="json")
    with pytest.raises(Gone):
        store.answers.get(asked.id)


def test_jobs_about_its_answers_are_cancelled(store: Store) -> None:
    for name, study in (("ans_1", "st"), ("ans_2", "st"), ("ans_3", "other")):
        store.answers.add(about("i", name, study), image_ttl=None)
    jobs = [
        store.jobs.submit(Job(kind=JobKind.SCORE_ANSWER, payload={"answer_id": f"ans_{n}"}))
        for n in (1, 2, 3)
    ]
    store.jobs.claim(jobs[1].id, "worker", timedelta(minutes=1))
    store.preferences.delete_study("st", "key_1")
    assert [store.jobs.get(job.id).state for job in jobs] == [
        JobState.CANCELLED, JobState.RUNNING, JobState.QUEUED,
    ]  # fmt: skip
    assert store.jobs.heartbeat(jobs[1].id, 1, timedelta(minutes=1)), "its worker is asked to stop"


def test_a_tombstone_lists_adapters_that_were_finished_since(store: Store) -> None:
    digest = store.blobs.put(b"pixels")
    store.preferences.add_sources([source("s1", image_digest=digest)])
    record = learn(store, "s1", digest)
    store.preferences.delete_study("st", "key_1")
    with store.database.write() as connection:
        add_adapter(connection, adapter("b@222222222222"), [record])
    left = store.preferences.tombstone("st")
    assert (left.study, left.actor, left.adapters) == ("st", "key_1", ("a@111111111111", "b@222222222222"))
    with pytest.raises(NotFound):
        store.preferences.tombstone("other")


@pytest.mark.parametrize("dropped_first", [True, False])
def test_bytes_that_another_study_uploads_meanwhile_stay(store: Store, dropped_first: bool) -> None:
    """Both orders of the two that a deletion and an upload of the same image can meet in."""
    put = partial(store.blobs.put, b"pixels")
    digest = put()
    store.answers.add(about(digest), image_ttl=None)
    put()  # the upload finds them there
    _, unheld = store.preferences.delete_study("st", "key_1")
    steps = [
        lambda: store.images.drop_unheld(unheld),
        lambda: store.answers.add(about(digest, "ans_2", "other"), image_ttl=None, put_image=put),
    ]
    for step in steps if dropped_first else reversed(steps):
        step()
    assert store.blobs.get(digest) == b"pixels"
    assert store.images.lost([digest]) == []


def test_deletions_and_uploads_at_once_lose_nothing(settings: StoreSettings, store: Store) -> None:
    put = partial(store.blobs.put, b"pixels")
    digest = put()
    with store.database.write() as connection:
        hold_image(connection, digest, "study-0", None)
    together = Barrier(2)

    def delete(number: int) -> None:
        with Store.open(settings) as mine:
            together.wait()
            _, unheld = mine.preferences.delete_study(f"study-{number}", "key")
            mine.images.drop_unheld(unheld)

    def upload(number: int) -> None:
        with Store.open(settings) as mine:
            together.wait()
            put()
            given = about(digest, f"ans_{number}", f"study-{number + 1}")
            mine.answers.add(given, image_ttl=None, put_image=put)

    with ThreadPoolExecutor(2) as pool:
        for number in range(30):
            for done in [pool.submit(delete, number), pool.submit(upload, number)]:
                done.result()
            assert store.blobs.get(digest) == b"pixels", f"lost in round {number}"
    _, unheld = store.preferences.delete_study("study-30", "key")
    assert store.images.drop_unheld(unheld) == [digest]
    assert images_in(store) == set()


def test_feedback_after_the_image_expired_trains_nothing(store: Store) -> None:
    store.answers.add(about("i"), image_ttl=timedelta(seconds=-1))
    store.answers.expire_images()
    store.answers.judge(Feedback(answer_id="ans_1", verdict=Verdict.ACCEPT, trainable=True))
    assert store.preferences.pending("any") == []
    assert store.images.held() == set(), "no row without its bytes"
    assert len(store.answers.feedback("ans_1")) == 1


def aged(path: Path) -> None:
    before = time.time() - 3600
    os.utime(path, (before, before))


def test_the_check_finds_files_without_rows_and_rows_without_files(store: Store, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "w").write_bytes(b"w")
    stray, young, held, lost = (store.blobs.put(name) for name in (b"stray", b"young", b"held", b"lost"))
    folder = store.blobs.put_folder(weights)
    for path in (store.blobs.path(stray), store.blobs.folder(folder) / "READY"):
        aged(path)
    with store.database.write() as connection:
        for digest in (held, lost):
            hold_image(connection, digest, "st", None)
        hold_image(connection, "e" * 64, "st", timedelta(seconds=-1))  # its time is over: not missed
        add_adapter(connection, adapter(), [])
    store.blobs.path(lost).unlink()

    found = check(store, older_than=timedelta(minutes=10))

    assert found == Findings(
        unheld_images=(stray,),
        unknown_folders=(folder,),
        lost_images=(lost,),
        lost_adapters=(adapter().name,),
    )
    repair(store, found)
    assert images_in(store) == {young, held}
    with pytest.raises(NotFound):
        store.blobs.folder(folder)
    assert last_findings(store.blobs) == Findings()
    keep_findings(store, found)
    assert last_findings(store.blobs) == found
    assert check(store, older_than=NOW).unheld_images == (young,)


def test_a_repair_leaves_what_got_its_row_since_the_check(store: Store, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "w").write_bytes(b"w")
    digest, folder = store.blobs.put(b"late"), store.blobs.put_folder(weights)
    found = check(store, older_than=timedelta(seconds=-60))
    assert (found.unheld_images, found.unknown_folders) == ((digest,), (folder,))
    with store.database.write() as connection:
        hold_image(connection, digest, "st", None)
        add_adapter(connection, adapter(f"a@{folder[:12]}", digest=folder), [])
    repair(store, found)
    assert store.blobs.get(digest) == b"late"
    assert store.blobs.folder(folder)
