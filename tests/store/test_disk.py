"""A full and a read-only disk: a clear error, nothing half-written, and all goes on when there is space."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hscr.errors import StoreFull, StoreReadOnly
from hscr.records import Job, JobKind
from hscr.store.database import Database
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from tests.full_disk import SmallDisk, small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", megabytes=4) as mounted:
        yield mounted


@pytest.fixture
def settings(disk: SmallDisk) -> StoreSettings:
    settings = StoreSettings(home=disk.folder / "home", min_free_bytes=100_000)
    database = Database(settings.database)
    database.upgrade()
    database.close()
    return settings


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_full_disk_keeps_nothing_half_and_goes_on_by_itself(
    disk: SmallDisk, store: Store, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "adapter.safetensors").write_bytes(bytes(500_000))
    kept = store.jobs.submit(Job(kind=JobKind.SCORE))
    assert store.disk.trouble() is None
    with disk.full():
        for write in (
            lambda: store.blobs.put(b"image" * 1000),
            lambda: store.blobs.put_folder(weights),
            lambda: store.jobs.submit(Job(kind=JobKind.SCORE)),
        ):
            with pytest.raises(StoreFull) as refused:
                write()
            assert "Free some space" in refused.value.remedy
        assert files(store.blobs.root) == []
        assert [job.id for job in store.jobs.page()] == [kept.id], "what was accepted can still be read"
        assert isinstance(store.disk.trouble(), StoreFull)
    assert store.disk.trouble() is None
    assert store.blobs.get(store.blobs.put(b"image")) == b"image"
    assert store.blobs.folder(store.blobs.put_folder(weights))
    assert len(store.jobs.page()) == 1
    store.jobs.submit(Job(kind=JobKind.SCORE))


def test_half_a_folder_leaves_no_space_taken(disk: SmallDisk, store: Store, tmp_path: Path) -> None:
    """Its first file fits and its second does not."""
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "a").write_bytes(bytes(1_000_000))
    (weights / "b").write_bytes(bytes(4_000_000))
    with pytest.raises(StoreFull):
        store.blobs.put_folder(weights)
    assert files(store.blobs.root) == []


def test_little_space_is_left_to_what_is_under_way(settings: StoreSettings, store: Store) -> None:
    careful = settings.model_copy(update={"min_free_bytes": 10_000_000})
    with Store.open(careful) as other:
        assert isinstance(other.disk.trouble(), StoreFull)
        other.jobs.submit(Job(kind=JobKind.SCORE))


def test_a_read_only_disk_is_named(disk: SmallDisk, settings: StoreSettings) -> None:
    with disk.read_only(), pytest.raises(StoreReadOnly, match="writable again"):
        Store.open(settings)


def test_bytes_on_a_read_only_disk_are_refused(tmp_path: Path, settings: StoreSettings) -> None:
    """Rows elsewhere, as with a database server."""
    home = tmp_path / "other"
    with small_disk(home / "blobs", megabytes=1) as blobs, Store.open(_migrated(home)) as store:
        digest = store.blobs.put(b"image")
        with blobs.read_only():
            assert isinstance(store.disk.trouble(), StoreReadOnly)
            for write in (lambda: store.blobs.put(b"other"), lambda: store.blobs.delete(digest)):
                with pytest.raises(StoreReadOnly):
                    write()
            assert store.blobs.get(digest) == b"image"
        assert store.blobs.put(b"other")


def _migrated(home: Path) -> StoreSettings:
    settings = StoreSettings(home=home, min_free_bytes=0)
    database = Database(settings.database)
    database.upgrade()
    database.close()
    return settings
