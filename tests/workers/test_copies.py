"""What agents and workers copied from a bucket to their own disks, and when it goes."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from hscr.records import AdapterVersion, Replica, now
from hscr.store.blobs import READY
from hscr.store.releases import add_adapter
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from tests.s3_server import S3Server
from workers.copies import drop_copies

DAY = timedelta(days=1)


@pytest.fixture
def settings(settings: StoreSettings, s3: S3Server) -> StoreSettings:
    return settings.model_copy(update=s3.bucket())


def copied(store: Store, folder: Path, weights: bytes, *, days: float = 2) -> AdapterVersion:
    """A registered version whose files were copied to this machine so long ago."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    digest = store.blobs.put_folder(folder)
    before = time.time() - days * DAY.total_seconds()
    os.utime(store.blobs.folder(digest) / READY, (before, before))
    version = AdapterVersion(
        name=f"hscr@{digest[:12]}", digest=digest, base_digest="b", job_id="job_1", config={}, records=1,
        records_digest="r",
    )  # fmt: skip
    with store.database.write() as connection:
        add_adapter(connection, version, [])
    return version


def test_an_old_copy_goes_unless_something_may_load_it_or_has_it(store: Store, tmp_path: Path) -> None:
    names = ("unwanted", "young", "leased", "loaded")
    versions = {
        name: copied(store, tmp_path / "files", name.encode(), days=0.5 if name == "young" else 2)
        for name in names
    }
    store.releases.lease_version("a job", versions["leased"].name, DAY)
    replica = Replica(
        id="one", address="http://127.0.0.1:1", model="base", model_digest="b", engine="e/1",
        numeric_mode="cpu/float32", template_digest="t", loaded=(versions["loaded"].name,), ready=True,
        seen_at=now(),
    )  # fmt: skip
    store.releases.report_replica(replica)
    half = store.blobs.root / "aside" / "of a process that was killed"
    for entry, days in ((half, 2), (half.with_name("of one that goes on"), 0)):
        entry.mkdir(parents=True)
        (entry / "weights").write_bytes(b"wei")
        os.utime(entry, (time.time() - days * DAY.total_seconds(),) * 2)
    assert drop_copies(store, older_than=DAY) == [versions["unwanted"].digest]
    assert [path.name for path in half.parent.iterdir()] == ["of one that goes on"]
    assert store.blobs.copies().keys() == {versions[name].digest for name in names[1:]}
    assert drop_copies(store, older_than=DAY) == []
    assert all(store.blobs.holds_folder(version.digest) for version in versions.values())
    assert store.blobs.folder(versions["unwanted"].digest).is_dir(), "it is copied again when it is asked for"


def test_where_the_folders_lie_themselves_nothing_is_dropped(
    store: Store, settings: StoreSettings, tmp_path: Path
) -> None:
    with Store.open(settings.model_copy(update={"blobs_url": None})) as shared:
        version = copied(shared, tmp_path / "files", b"weights")
        assert drop_copies(shared, older_than=timedelta(0)) == []
        shared.blobs.drop_copy(version.digest)
        assert shared.blobs.holds_folder(version.digest)
