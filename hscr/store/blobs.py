"""Bytes under their own digest: images, and adapters as folders.

A blob is written aside, synced and renamed, so that a name that exists is a whole blob. A folder is trusted
only when its READY marker exists, which is written last.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from hscr.errors import NotFound, StoreError

READY = "READY"


def bytes_digest(data: bytes) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(data).hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the sorted relative paths and contents of all files but the READY marker, hex."""
    total = hashlib.sha256()
    for path in _files(folder):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


class Blobs:
    """A folder on local or shared disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, data: bytes) -> str:
        """Store bytes; the same bytes twice are one blob. Returns the digest."""
        digest = bytes_digest(data)
        target = self.path(digest)
        if not target.exists():
            aside = self._aside()
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
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
        self.path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        """All single blobs present."""
        yield from (path.name for path in sorted((self.root / "sha256").glob("*/*")))

    def path(self, digest: str) -> Path:
        return self.root / "sha256" / digest[:2] / digest

    def put_folder(self, source: Path) -> str:
        """Store a copy of a folder of plain files. Returns its digest."""
        digest = folder_digest(source)
        target = self.folder_path(digest)
        if (target / READY).exists():
            return digest
        if target.exists():
            shutil.rmtree(target)  # left by a writer that died before the marker
        aside = self._aside()
        shutil.copytree(source, aside, ignore=shutil.ignore_patterns(READY))
        for path in _files(aside):
            _sync(path)
        _publish(aside, target)
        (target / READY).write_text(digest)
        _sync(target / READY)
        _sync(target)
        return digest

    def folder(self, digest: str) -> Path:
        """The stored folder; raises NotFound unless it is whole."""
        path = self.folder_path(digest)
        if not (path / READY).exists():
            raise _missing(digest)
        return path

    def folder_path(self, digest: str) -> Path:
        return self.root / "folders" / digest

    def _aside(self) -> Path:
        aside = self.root / "aside"
        aside.mkdir(parents=True, exist_ok=True)
        return aside / uuid4().hex


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != READY)


def _publish(aside: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _missing(digest: str) -> NotFound:
    return NotFound(
        f"Nothing is stored under {digest[:12]}….", remedy="It may have expired; upload it again."
    )
