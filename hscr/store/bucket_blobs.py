"""Blobs in a bucket of an S3-compatible object store, for processes that share no disk.

The bucket alone counts. An image is read from it each time, because a copy elsewhere would outlive its
deletion; an adapter's folder is copied to this machine once, and checked, for an engine that loads it there.
A folder's READY object is written last and removed first, so that who sees it sees a whole folder.
"""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from hscr.errors import ObjectStoreUnavailable, StoreError
from hscr.store.blobs import (
    READY,
    bytes_digest,
    check_whole,
    checked,
    files_of,
    folder_digest,
    intact,
    missing,
    remove,
)
from hscr.store.folder_blobs import FolderBlobs
from hscr.store.settings import StoreSettings

if TYPE_CHECKING:
    from obstore.store import S3Config

_CHUNK = 8 << 20


class BucketBlobs:
    """`settings.blobs_url` names the bucket, and `settings.blobs` is the folder of this machine's copies."""

    def __init__(self, settings: StoreSettings) -> None:
        """Raises StoreError for what is no URL of a bucket; the bucket itself is not asked."""
        self.root = settings.blobs
        self._copies = FolderBlobs(settings.blobs)
        self._bucket = _bucket(settings)

    def put(self, data: bytes) -> str:
        digest = bytes_digest(data)
        if not self.exists(digest):
            self._write(_image(digest), data)
        return digest

    def get(self, digest: str) -> bytes:
        data = self._read(_image(digest))
        if data is None:
            raise missing(digest)
        return intact(digest, data)

    def exists(self, digest: str) -> bool:
        return self._has(_image(digest))

    def delete(self, digest: str) -> None:
        self._remove(_image(digest))

    def stored(self, prefix: str) -> dict[str, float]:
        return {key.rpartition("/")[2]: time for key, time in self._list(f"sha256/{prefix}")}

    def put_folder(self, source: Path) -> str:
        digest = folder_digest(source)
        for path in files_of(source):
            self._write(_file(digest, path.relative_to(source).as_posix()), path)
        self._write(_file(digest, READY), digest.encode())
        return digest

    def folder(self, digest: str) -> Path:
        if not self._copies.holds_folder(digest):
            self._copy(digest)
        return self._copies.folder(digest)

    def holds_folder(self, digest: str) -> bool:
        return self._has(_file(digest, READY))

    def delete_folder(self, digest: str) -> None:
        self._remove(_file(digest, READY))
        for key, _ in self._list(_file(digest)):
            self._remove(key)

    def folders(self) -> dict[str, float]:
        newest: dict[str, float] = {}
        for key, time in self._list("folders"):
            digest = key.split("/")[1]
            newest[digest] = max(time, newest.get(digest, 0))
        return newest

    def copies(self) -> dict[str, float]:
        return self._copies.folders()

    def drop_copy(self, digest: str) -> None:
        folder = self._copies.folder_path(digest)
        (folder / READY).unlink(missing_ok=True)
        remove(folder)

    def hand_over(self, name: str, folder: Path) -> None:
        with self._copies.written_aside() as aside:
            with tarfile.open(aside, "w") as tar:
                tar.add(folder, "")
            self._write(_handed(name), aside)
            remove(aside)

    def take_over(self, name: str, folder: Path) -> bool:
        if not self._has(_handed(name)):
            return False
        with self._copies.written_aside() as aside, self._copies.written_aside() as filled:
            self._download(_handed(name), aside)
            with tarfile.open(aside) as tar:
                tar.extractall(filled, filter="data")
            remove(aside)
            folder.parent.mkdir(parents=True, exist_ok=True)
            filled.rename(folder)
        return True

    def handed_over(self) -> list[str]:
        return [key.rpartition("/")[2].removesuffix(".tar") for key, _ in self._list("handed")]

    def drop_handed_over(self, name: str) -> None:
        self._remove(_handed(name))

    def publish(self, name: str, data: bytes) -> None:
        self._write(name, data)

    def published(self, name: str) -> bytes | None:
        return self._read(name)

    def _copy(self, digest: str) -> None:
        """Bring a whole folder to this machine. Raises NotFound; StoreError when its files are not those."""
        if not self.holds_folder(digest):
            raise missing(digest)
        with self._copies.filling(digest) as folder:
            prefix = _file(digest)
            for key, _ in self._list(prefix):
                self._download(key, folder / key.removeprefix(f"{prefix}/"))
            check_whole(digest, folder)

    def _download(self, key: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _answering(), target.open("wb") as file:
            for chunk in obstore.get(self._bucket, key).stream(min_chunk_size=_CHUNK):
                file.write(chunk)

    def _write(self, key: str, data: bytes | Path) -> None:
        with _answering():
            obstore.put(self._bucket, key, data)

    def _read(self, key: str) -> bytes | None:
        with _answering(), suppress(FileNotFoundError):
            return obstore.get(self._bucket, key).bytes().to_bytes()
        return None

    def _has(self, key: str) -> bool:
        with _answering(), suppress(FileNotFoundError):
            obstore.head(self._bucket, key)
            return True
        return False

    def _remove(self, key: str) -> None:
        with _answering(), suppress(FileNotFoundError):  # some stores say so, others nothing
            obstore.delete(self._bucket, key)

    def _list(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Keys below a prefix, and when each was written."""
        with _answering():
            for some in obstore.list(self._bucket, prefix):
                yield from ((each["path"], each["last_modified"].timestamp()) for each in some)


def _bucket(settings: StoreSettings) -> S3Store:
    given = {
        "endpoint": settings.s3_endpoint,
        "region": settings.s3_region,
        "access_key_id": settings.s3_access_key_id,
        "secret_access_key": settings.s3_secret_access_key,
    }
    plain = (settings.s3_endpoint or "").startswith("http://")
    url = settings.blobs_url or ""
    if not url.startswith("s3://") or not url.removeprefix("s3://").strip("/"):
        raise StoreError(
            "HSCR_BLOBS_URL names no bucket.", remedy="Use `s3://BUCKET` or `s3://BUCKET/PREFIX`."
        )
    return S3Store.from_url(
        url,
        client_options={"connect_timeout": "5s", "timeout": "60s", "allow_http": plain},
        retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=20)},
        config=cast("S3Config", {name: value for name, value in given.items() if value is not None}),
    )


@contextmanager
def _answering() -> Iterator[None]:
    """The many ways in which a bucket is away, or refuses, are one error to our callers."""
    try:
        yield
    except (BaseError, FileNotFoundError) as error:  # no such file: no such bucket
        # The message may name hosts and keys; its class says as much.
        raise ObjectStoreUnavailable(
            f"The object store did not answer, or refused ({type(error).__name__}).",
            remedy="Try again; if it lasts, check HSCR_BLOBS_URL, HSCR_S3_ENDPOINT and the access key: "
            "`hscr doctor`.",
        ) from error


def _image(digest: str) -> str:
    return f"sha256/{checked(digest)[:2]}/{digest}"


def _handed(name: str) -> str:
    return f"handed/{name}.tar"


def _file(digest: str, *name: str) -> str:
    return "/".join(("folders", checked(digest), *name))
