"""Bytes under their own digest: images, and adapters as folders.

A blob is written aside, synced and renamed, so that a name that exists is a whole blob. A folder is trusted
only when its READY marker exists, which is written last, after everything else is on disk.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from hscr.durable import sync
from hscr.errors import NotFound, StoreError
from hscr.faults import fault_point
from hscr.store.disk import disk_errors

READY = "READY"
_DIGEST = re.compile("[0-9a-f]{64}")


def bytes_digest(data: bytes) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(data).hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the sorted relative paths and contents of all files but the READY marker, hex."""
    total = hashlib.sha256()
    for path in _files(folder):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


class Blobs:
    """A folder on local or shared disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, data: bytes) -> str:
        """Store bytes; the same bytes twice are one blob. Returns the digest.

        Raises StoreFull, StoreReadOnly.
        """
        digest = bytes_digest(data)
        target = self.path(digest)
        if not target.exists():
            with self._written_aside() as aside:
                with aside.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                fault_point("blob.aside")
                _publish(aside, target)
        return digest

    def get(self, digest: str) -> bytes:
        """Raises NotFound; StoreError when the bytes no longer match their name."""
        try:
            data = self.path(digest).read_bytes()
        except FileNotFoundError as error:
            raise _missing(digest) from error
        if bytes_digest(data) != digest:
            raise StoreError(
                f"Blob {digest[:12]} is damaged on disk.",
                remedy="Restore it from a backup or upload it again.",
            )
        return data

    def exists(self, digest: str) -> bool:
        return self.path(digest).exists()

    def delete(self, digest: str) -> None:
        with disk_errors():
            self.path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        """All single blobs present."""
        yield from (path.name for path in sorted((self.root / "sha256").glob("*/*")))

    def path(self, digest: str) -> Path:
        """Raises NotFound for what is no digest, so that no name leads out of the store."""
        return self.root / "sha256" / _checked(digest)[:2] / digest

    def put_folder(self, source: Path) -> str:
        """Store a copy of a folder of plain files; one that is stored but damaged is replaced.

        Returns its digest. Raises StoreFull, StoreReadOnly.
        """
        digest = folder_digest(source)
        target = self.folder_path(digest)
        if (target / READY).exists() and folder_digest(target) == digest:
            with disk_errors():
                (target / READY).touch()  # young again, so that no sweep takes it before its row is there
            return digest
        with self._written_aside() as aside:
            _copy(source, aside)
            for path in (*_files(aside), aside):
                sync(path)
            fault_point("folder.copied")
            (aside / READY).write_text(digest)
            sync(aside / READY)
            sync(aside)
            if target.exists():
                target.rename(self._aside())  # swept later; what an engine has open stays readable
            fault_point("folder.aside")
            _publish(aside, target)
        return digest

    def delete_folder(self, digest: str) -> None:
        """At once gone under its name; its files are swept."""
        target = self.folder_path(digest)
        if target.exists():
            with disk_errors():
                target.rename(self._aside())

    def publish(self, name: str, data: bytes) -> None:
        """Replace a small file beside the blobs; whoever reads it sees the old one or the new one."""
        with self._written_aside() as aside:
            aside.write_bytes(data)
            sync(aside)
            _publish(aside, self.root / name)

    def folder(self, digest: str) -> Path:
        """The stored folder; raises NotFound unless it is whole."""
        path = self.folder_path(digest)
        if not (path / READY).exists():
            raise _missing(digest)
        return path

    def folder_path(self, digest: str) -> Path:
        return self.root / "folders" / _checked(digest)

    def _aside(self) -> Path:
        aside = self.root / "aside"
        aside.mkdir(parents=True, exist_ok=True)
        return aside / uuid4().hex

    @contextmanager
    def _written_aside(self) -> Iterator[Path]:
        """A place to write what is then published; a half-written thing does not go on filling the disk."""
        with disk_errors():
            aside = self._aside()
            try:
                yield aside
            except BaseException:
                remove(aside)
                raise


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _checked(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise _missing(digest)
    return digest


def _copy(source: Path, target: Path) -> None:
    """All that counts for the digest. `shutil.copytree` would tell of a full disk in words only."""
    target.mkdir()
    for path in _files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != READY)


def _publish(aside: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(target)
    sync(target.parent)


def _missing(digest: str) -> NotFound:
    return NotFound(
        f"Nothing is stored under {digest[:12]!r}….", remedy="It may have expired; upload it again."
    )
