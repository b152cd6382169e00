"""Blobs in a folder on local or shared disk.

A blob is written aside, synced and renamed, so that a name that exists is a whole blob. A folder is trusted
only when its READY marker exists, which is written last, after everything else is on disk.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from hscr.durable import sync
from hscr.faults import fault_point
from hscr.store.blobs import (
    READY,
    bytes_digest,
    checked,
    files_of,
    folder_digest,
    intact,
    missing,
    remove,
    times_of,
)
from hscr.store.disk import disk_errors


class FolderBlobs:
    """All under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, data: bytes) -> str:
        digest = bytes_digest(data)
        target = self.path(digest)
        if not target.exists():
            with self.written_aside() as aside:
                with aside.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                fault_point("blob.aside")
                _publish(aside, target)
        return digest

    def get(self, digest: str) -> bytes:
        try:
            return intact(digest, self.path(digest).read_bytes())
        except FileNotFoundError as error:
            raise missing(digest) from error

    def exists(self, digest: str) -> bool:
        return self.path(digest).exists()

    def delete(self, digest: str) -> None:
        with disk_errors():
            self.path(digest).unlink(missing_ok=True)

    def stored(self, prefix: str) -> dict[str, float]:
        return times_of(self.root / "sha256" / prefix)

    def path(self, digest: str) -> Path:
        """Raises NotFound for what is no digest."""
        return self.root / "sha256" / checked(digest)[:2] / digest

    def put_folder(self, source: Path) -> str:
        digest = folder_digest(source)
        target = self.folder_path(digest)
        if self.holds_folder(digest) and folder_digest(target) == digest:
            with disk_errors():
                (target / READY).touch()
        else:
            with self.filling(digest) as folder:
                _copy(source, folder)
        return digest

    def folder(self, digest: str) -> Path:
        if not self.holds_folder(digest):
            raise missing(digest)
        return self.folder_path(digest)

    def holds_folder(self, digest: str) -> bool:
        return (self.folder_path(digest) / READY).exists()

    def delete_folder(self, digest: str) -> None:
        """Its files are swept later."""
        target = self.folder_path(digest)
        if target.exists():
            with disk_errors():
                target.rename(self._aside())

    def folders(self) -> dict[str, float]:
        folder = self.root / "folders"
        times = times_of(folder)
        for name in times:
            with suppress(FileNotFoundError):
                times[name] = (folder / name / READY).stat().st_mtime
        return times

    def copies(self) -> dict[str, float]:
        return {}

    def drop_copy(self, digest: str) -> None:
        """There is none to drop."""

    def hand_over(self, name: str, folder: Path) -> None:
        """Who shares the root sees it where it is."""

    def take_over(self, name: str, folder: Path) -> bool:  # noqa: ARG002
        return False

    def handed_over(self) -> list[str]:
        return []

    def drop_handed_over(self, name: str) -> None:
        """There is none to drop."""

    def folder_path(self, digest: str) -> Path:
        """Where it is, or would be. Raises NotFound for what is no digest."""
        return self.root / "folders" / checked(digest)

    def publish(self, name: str, data: bytes) -> None:
        with self.written_aside() as aside:
            aside.write_bytes(data)
            sync(aside)
            _publish(aside, self.root / name)

    def published(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    @contextmanager
    def filling(self, digest: str) -> Iterator[Path]:
        """An empty folder to be filled with the files of this digest; it is kept at the end of the block."""
        with self.written_aside() as aside:
            aside.mkdir()
            yield aside
            for path in (*files_of(aside), aside):
                sync(path)
            fault_point("folder.copied")
            (aside / READY).write_text(digest)
            sync(aside / READY)
            sync(aside)
            # What was there is swept later; what an engine has open stays readable.
            self.delete_folder(digest)
            fault_point("folder.aside")
            _publish(aside, self.folder_path(digest))

    @contextmanager
    def written_aside(self) -> Iterator[Path]:
        """A place to write what is then published; a half-written thing does not go on filling the disk."""
        with disk_errors():
            aside = self._aside()
            try:
                yield aside
            except BaseException:
                remove(aside)
                raise

    def _aside(self) -> Path:
        aside = self.root / "aside"
        aside.mkdir(parents=True, exist_ok=True)
        return aside / uuid4().hex


def _copy(source: Path, target: Path) -> None:
    """All that counts for the digest. `shutil.copytree` would tell of a full disk in words only."""
    for path in files_of(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _publish(aside: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(target)
    sync(target.parent)
