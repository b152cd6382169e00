"""Bytes under their own digest: images, and adapters as folders.

The port; its two kinds are a folder (`folder_blobs.py`) and a bucket of an object store (`bucket_blobs.py`).
"""

import hashlib
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from hscr.errors import NotFound, StoreError
from hscr.store.settings import StoreSettings

READY = "READY"
"""written last into a folder, which is trusted only with it"""
_DIGEST = re.compile("[0-9a-f]{64}")


class Blobs(Protocol):
    """Raises StoreFull, StoreReadOnly, ObjectStoreUnavailable, as far as that can happen to its kind."""

    root: Path
    """on this machine: for what is being written, and for checkpoints"""

    def put(self, data: bytes) -> str:
        """Store bytes; the same bytes twice are one blob. Returns the digest."""

    def get(self, digest: str) -> bytes:
        """Raises NotFound; StoreError when the bytes no longer match their name."""

    def exists(self, digest: str) -> bool: ...

    def delete(self, digest: str) -> None:
        """Nothing happens if it is gone already."""

    def stored(self, prefix: str) -> dict[str, float]:
        """When each single blob whose digest begins with these two letters was stored, in Unix seconds."""

    def put_folder(self, source: Path) -> str:
        """Store a copy of a folder of plain files; one that is stored but damaged is replaced.

        One that is stored already is young again, so that no sweep takes it before its row is there.
        Returns its digest.
        """

    def folder(self, digest: str) -> Path:
        """The stored folder, on this machine; raises NotFound unless it is whole."""

    def holds_folder(self, digest: str) -> bool:
        """Whether it is stored, and whole; what this machine has a copy of does not count."""

    def delete_folder(self, digest: str) -> None:
        """At once gone under its name."""

    def folders(self) -> dict[str, float]:
        """When each folder, whole or not, was stored, in Unix seconds."""

    def copies(self) -> dict[str, float]:
        """When each folder was copied to this machine, in Unix seconds; none where the folders lie on it."""

    def drop_copy(self, digest: str) -> None:
        """Of what nothing on this machine reads any more."""

    def hand_over(self, name: str, folder: Path) -> None:
        """Leave a folder as it is now for other machines, in place of what had this name.

        Nothing happens, here and in the next three, where machines share `root`.
        """

    def take_over(self, name: str, folder: Path) -> bool:
        """Fill a folder, which must not exist, with what was handed over; False when nothing was."""

    def handed_over(self) -> list[str]:
        """All names."""

    def drop_handed_over(self, name: str) -> None:
        """Nothing happens if it is gone already."""

    def publish(self, name: str, data: bytes) -> None:
        """Replace a small file beside the blobs; whoever reads it sees the old one or the new one."""

    def published(self, name: str) -> bytes | None:
        """None for what was never published."""


def open_blobs(settings: StoreSettings) -> Blobs:
    """The kind that the settings name. Raises StoreError for a URL that is none of a bucket."""
    from hscr.store.folder_blobs import FolderBlobs  # noqa: PLC0415  both need what is below

    if settings.blobs_url is None:
        return FolderBlobs(settings.blobs)
    from hscr.store.bucket_blobs import BucketBlobs  # noqa: PLC0415

    return BucketBlobs(settings)


def bytes_digest(data: bytes) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(data).hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the sorted relative paths and contents of all files but the READY marker, hex."""
    total = hashlib.sha256()
    for path in files_of(folder):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


def files_of(folder: Path) -> list[Path]:
    """All that counts for the digest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != READY)


def times_of(folder: Path) -> dict[str, float]:
    """When each entry of a folder was last written. It may not exist, and they may go meanwhile."""
    times = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):
            times[path.name] = path.stat().st_mtime
    return times


def checked(digest: str) -> str:
    """Raises NotFound for what is no digest, so that no name leads out of the store."""
    if not _DIGEST.fullmatch(digest):
        raise missing(digest)
    return digest


def intact(digest: str, data: bytes) -> bytes:
    """Raises StoreError for bytes of another name."""
    if bytes_digest(data) != digest:
        raise StoreError(
            f"Blob {digest[:12]} is damaged.", remedy="Restore it from a backup or upload it again."
        )
    return data


def check_whole(digest: str, folder: Path) -> None:
    """Raises StoreError for files of another name."""
    if folder_digest(folder) != digest:
        raise StoreError(
            f"The files of adapter {digest[:12]} are not those that were stored.",
            remedy="Restore them from a backup, or train on the same records again.",
        )


def missing(digest: str) -> NotFound:
    return NotFound(
        f"Nothing is stored under {digest[:12]!r}….", remedy="It may have expired; upload it again."
    )


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
