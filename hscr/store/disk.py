"""Whether the disk under the store can take more, and what its failures mean."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import SQLITE_FULL, SQLITE_READONLY

from sqlalchemy.exc import DBAPIError

from hscr.errors import StoreError, StoreFull, StoreReadOnly


class Disk:
    """The file systems that some folders are on; `reserve` bytes of each are left to what is under way."""

    def __init__(self, *folders: Path, reserve: int) -> None:
        self._folders = folders
        self._reserve = reserve

    def trouble(self) -> StoreError | None:
        """Why nothing new should be begun now, if there is a reason."""
        for folder in self._folders:
            about = os.statvfs(_existing(folder))
            if about.f_flag & os.ST_RDONLY:
                return _read_only()
            if about.f_bavail * about.f_frsize < self._reserve:
                return _full()
        return None


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raises StoreFull and StoreReadOnly for what files and databases say of their disk."""
    try:
        yield
    except (OSError, DBAPIError) as error:
        found = meaning(error)
        if found is None:
            raise
        raise found from error


def meaning(error: OSError | DBAPIError) -> StoreError | None:
    """The error to raise instead, if the disk is to blame."""
    if isinstance(error, OSError):
        kind = _FILES.get(error.errno or 0)
    else:
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # the rest says where SQLite met it
        kind = _SQLITE.get(code) or _POSTGRES.get(getattr(error.orig, "sqlstate", None) or "")
    return kind and kind()


def _full() -> StoreError:
    return StoreFull(
        "The disk of the store is full, so nothing new is taken.",
        remedy="Free some space, then try again: everything goes on by itself. `hscr doctor` looks for you.",
    )


def _read_only() -> StoreError:
    return StoreReadOnly(
        "The disk of the store cannot be written to, so nothing new is taken.",
        remedy="Make HSCR_HOME writable again; everything then goes on by itself.",
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


_FILES = {errno.ENOSPC: _full, errno.EDQUOT: _full, errno.EFBIG: _full, errno.EROFS: _read_only}
_SQLITE = {SQLITE_FULL: _full, SQLITE_READONLY: _read_only}
_POSTGRES = {"53100": _full, "25006": _read_only}
