"""Bytes by their digest: in a folder, and in a bucket of an object store."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest

from hscr.errors import NotFound, ObjectStoreUnavailable, StoreError
from hscr.store.blobs import READY, Blobs, bytes_digest, folder_digest, open_blobs
from hscr.store.bucket_blobs import BucketBlobs
from hscr.store.check import Findings, check, keep_findings, last_findings, repair
from hscr.store.folder_blobs import FolderBlobs
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from tests.certificates import Certificates, TlsFront
from tests.s3_server import S3Server

NOBODY = "f" * 64


@pytest.fixture
def bucket(s3: S3Server) -> dict[str, Any]:
    return s3.bucket()


@pytest.fixture(params=["folder", "bucket"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    where = {} if request.param == "folder" else request.getfixturevalue("bucket")
    return open_blobs(StoreSettings(home=tmp_path / "home", **where))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder as an adapter has it."""
    source = tmp_path / "adapter"
    (source / "more").mkdir(parents=True)
    (source / "adapter_model.safetensors").write_bytes(b"weights")
    (source / "more" / "notes").write_text("ü")
    return source


def overwrite(blobs: Blobs, key: str, data: bytes | None) -> None:
    """As somebody else's hand would; None removes it."""
    if isinstance(blobs, BucketBlobs):
        if data is None:
            obstore.delete(blobs._bucket, key)
        else:
            obstore.put(blobs._bucket, key, data)
    elif data is None:
        (blobs.root / key).unlink()
    else:
        (blobs.root / key).write_bytes(data)


def test_bytes_are_named_by_their_content_and_damage_is_noticed(blobs: Blobs) -> None:
    digest = blobs.put(b"pixels")
    assert digest == bytes_digest(b"pixels") == blobs.put(b"pixels")
    assert blobs.get(digest) == b"pixels"
    assert blobs.exists(digest)
    assert blobs.stored(digest[:2]).keys() == {digest}
    overwrite(blobs, f"sha256/{digest[:2]}/{digest}", b"rot")
    with pytest.raises(StoreError, match="damaged"):
        blobs.get(digest)
    for _ in range(2):
        blobs.delete(digest)
    assert not blobs.exists(digest)
    assert blobs.stored(digest[:2]) == {}
    with pytest.raises(NotFound, match="expired"):
        blobs.get(digest)


def test_a_folder_without_its_marker_does_not_exist(blobs: Blobs, adapter: Path) -> None:
    assert blobs.folders() == {}
    digest = blobs.put_folder(adapter)
    assert digest == folder_digest(adapter)
    overwrite(blobs, f"folders/{digest}/{READY}", None)
    assert not blobs.holds_folder(digest)
    with pytest.raises(NotFound):
        blobs.folder(digest)
    assert blobs.folders().keys() == {digest}, "what was begun is there to be swept"
    assert blobs.put_folder(adapter) == digest, "and is written again"
    assert blobs.holds_folder(digest)
    folder = blobs.folder(digest)
    assert folder_digest(folder) == digest
    assert (folder / "more" / "notes").read_text() == "ü"


def test_a_damaged_folder_is_replaced_by_who_stores_it_again(blobs: Blobs, adapter: Path) -> None:
    digest = blobs.put_folder(adapter)
    overwrite(blobs, f"folders/{digest}/adapter_model.safetensors", b"rot")
    assert blobs.put_folder(adapter) == digest
    assert folder_digest(blobs.folder(digest)) == digest


def test_a_deleted_folder_is_gone(blobs: Blobs, adapter: Path) -> None:
    digest = blobs.put_folder(adapter)
    for _ in range(2):
        blobs.delete_folder(digest)
    assert not blobs.holds_folder(digest)
    assert blobs.folders() == {}
    with pytest.raises(NotFound):
        blobs.folder(digest)


def test_it_is_known_when_something_was_stored(blobs: Blobs, adapter: Path) -> None:
    before = time.time() - 2  # a bucket tells whole seconds
    digest, folder = blobs.put(b"pixels"), blobs.put_folder(adapter)
    for moment in (blobs.stored(digest[:2])[digest], blobs.folders()[folder]):
        assert before <= moment <= time.time() + 2


def test_small_files_beside_them_are_replaced_whole(blobs: Blobs) -> None:
    assert blobs.published("last.json") is None
    for text in (b"{}", b'{"n": 1}'):
        blobs.publish("last.json", text)
        assert blobs.published("last.json") == text


@pytest.mark.parametrize(
    "name", ["..", "../../etc/passwd", "/etc/passwd", "", "a" * 63, "A" * 64, "a" * 64 + "\n"]
)
def test_no_name_leads_out_of_the_blobs(blobs: Blobs, name: str) -> None:
    looks = (
        blobs.get, blobs.exists, blobs.delete, blobs.folder, blobs.holds_folder, blobs.delete_folder,
    )  # fmt: skip
    for look in looks:
        with pytest.raises(NotFound):
            look(name)


def test_the_check_of_a_store_compares_a_bucket_as_well(
    settings: StoreSettings, bucket: dict[str, Any], adapter: Path
) -> None:
    with Store.open(settings.model_copy(update=bucket)) as store:
        stray, folder = store.blobs.put(b"stray"), store.blobs.put_folder(adapter)
        assert check(store, older_than=timedelta(hours=1)) == Findings(), "they are too young"
        found = check(store, older_than=timedelta(seconds=-10))
        assert found == Findings(unheld_images=(stray,), unknown_folders=(folder,))
        repair(store, found)
        assert not store.blobs.exists(stray)
        assert store.blobs.folders() == {}
        keep_findings(store, found)
        assert last_findings(store.blobs) == found


# -- a bucket alone ----------------------------------------------------------------------------------------


@pytest.fixture
def machines(tmp_path: Path, bucket: dict[str, Any]) -> tuple[Blobs, Blobs]:
    """Two that share the bucket and no disk."""
    first, second = (open_blobs(StoreSettings(home=tmp_path / name, **bucket)) for name in ("one", "two"))
    return first, second


def test_machines_share_a_bucket_and_nothing_else(machines: tuple[Blobs, Blobs], adapter: Path) -> None:
    first, second = machines
    digest = first.put(b"pixels")
    assert second.get(digest) == b"pixels"
    folder = first.put_folder(adapter)
    assert folder_digest(second.folder(folder)) == folder
    assert second.folder(folder).is_relative_to(second.root)


def test_no_image_stays_on_a_machine_that_read_it(machines: tuple[Blobs, Blobs]) -> None:
    first, second = machines
    second.get(first.put(b"pixels"))
    for machine in machines:
        assert not [path for path in machine.root.rglob("*") if path.is_file()]


def test_a_copy_of_an_adapter_does_not_stand_for_what_is_stored(
    machines: tuple[Blobs, Blobs], adapter: Path
) -> None:
    first, second = machines
    digest = first.put_folder(adapter)
    second.folder(digest)
    first.delete_folder(digest)
    assert not second.holds_folder(digest)


def test_files_that_are_not_those_that_were_stored_are_not_kept(
    machines: tuple[Blobs, Blobs], adapter: Path
) -> None:
    first, second = machines
    digest = first.put_folder(adapter)
    overwrite(first, f"folders/{digest}/adapter_model.safetensors", b"somebody's")
    with pytest.raises(StoreError, match="not those that were stored"):
        second.folder(digest)
    assert not [path for path in second.root.rglob("*") if path.is_file()]


def test_a_folder_is_handed_over_from_machine_to_machine(
    machines: tuple[Blobs, Blobs], adapter: Path, tmp_path: Path
) -> None:
    first, second = machines
    assert not second.take_over("job_1", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for weights in (b"step 10", b"step 20"):
        (adapter / "adapter_model.safetensors").write_bytes(weights)
        first.hand_over("job_1", adapter)
    assert first.handed_over() == second.handed_over() == ["job_1"]
    assert second.take_over("job_1", tmp_path / "taken")
    assert folder_digest(tmp_path / "taken") == folder_digest(adapter)
    for machine in machines:
        assert not [path for path in machine.root.rglob("*") if path.is_file()], "nothing is left over"
    for _ in range(2):
        second.drop_handed_over("job_1")
    assert first.handed_over() == []


def test_on_a_shared_disk_nothing_is_handed_over(tmp_path: Path, adapter: Path) -> None:
    blobs = open_blobs(StoreSettings(home=tmp_path / "home"))
    blobs.hand_over("job_1", adapter)
    assert blobs.handed_over() == []
    assert not blobs.take_over("job_1", tmp_path / "taken")
    blobs.drop_handed_over("job_1")
    assert not blobs.root.exists()


def test_an_object_store_refuses_a_wrong_key(tmp_path: Path, bucket: dict[str, Any]) -> None:
    wrong = {**bucket, "s3_secret_access_key": "somebody's"}
    blobs = open_blobs(StoreSettings(home=tmp_path / "home", **wrong))
    with pytest.raises(ObjectStoreUnavailable, match="access key"):
        blobs.put(b"pixels")
    assert not open_blobs(StoreSettings(home=tmp_path / "home", **bucket)).exists(bytes_digest(b"pixels"))


def test_an_object_store_that_is_away_is_said_to_be_without_its_names(
    tmp_path: Path, bucket: dict[str, Any], adapter: Path
) -> None:
    away = {**bucket, "s3_endpoint": "http://127.0.0.1:9"}
    blobs = open_blobs(StoreSettings(home=tmp_path / "home", **away))
    calls = (
        lambda: blobs.put(b"pixels"), lambda: blobs.get(NOBODY), lambda: blobs.exists(NOBODY),
        lambda: blobs.delete(NOBODY), lambda: blobs.put_folder(adapter), lambda: blobs.folder(NOBODY),
        lambda: blobs.holds_folder(NOBODY), blobs.folders, lambda: blobs.stored("ff"),
        lambda: blobs.publish("last.json", b"{}"), lambda: blobs.published("last.json"),
        lambda: blobs.hand_over("job", adapter), lambda: blobs.take_over("job", tmp_path / "taken"),
        blobs.handed_over, lambda: blobs.drop_handed_over("job"),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ObjectStoreUnavailable, match="hscr doctor") as told:
            call()
        assert not any(
            word in str(told.value) for word in ("127.0.0.1", away["s3_secret_access_key"], NOBODY)
        )


def test_a_bucket_that_does_not_exist_takes_nothing(tmp_path: Path, bucket: dict[str, Any]) -> None:
    blobs = open_blobs(StoreSettings(home=tmp_path / "home", **{**bucket, "blobs_url": "s3://nobodys"}))
    with pytest.raises(ObjectStoreUnavailable, match="HSCR_BLOBS_URL"):
        blobs.put(b"pixels")


@pytest.mark.parametrize("url", ["", "bucket", "s3://", "s3:///", "gs://bucket", "https://host/bucket"])
def test_what_is_no_url_of_a_bucket_is_refused_at_once(tmp_path: Path, url: str) -> None:
    with pytest.raises(StoreError, match="s3://BUCKET"):
        open_blobs(StoreSettings(home=tmp_path / "home", blobs_url=url))


def test_without_a_url_the_folder_of_this_machine_holds_them(tmp_path: Path) -> None:
    assert isinstance(open_blobs(StoreSettings(home=tmp_path / "home")), FolderBlobs)


_PUT = """
from hscr.store.blobs import open_blobs
from hscr.store.settings import StoreSettings
print(open_blobs(StoreSettings()).put(b"pixels"))
"""


@pytest.mark.parametrize("trusted", [True, False])
def test_the_certificate_of_an_object_store_must_be_of_a_ca_that_is_trusted(
    tmp_path: Path, s3: S3Server, bucket: dict[str, Any], trusted: bool
) -> None:
    """SSL_CERT_FILE names a CA of one's own, for this process alone."""
    certificates = Certificates.make(tmp_path / "ca")
    with TlsFront(certificates, s3.port) as front:
        given = {**bucket, "s3_endpoint": f"https://localhost:{front.port}", "home": str(tmp_path / "home")}
        environment = {f"HSCR_{name.upper()}": value for name, value in given.items()}
        if trusted:
            environment["SSL_CERT_FILE"] = str(certificates.authority)
        done = subprocess.run(
            [sys.executable, "-c", _PUT], env={**os.environ, **environment}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    if trusted:
        assert done.stdout.strip() == bytes_digest(b"pixels"), done.stderr
    else:
        assert "ObjectStoreUnavailable" in done.stderr
