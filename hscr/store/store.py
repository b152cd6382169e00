"""The one synchronous store of all processes: rows by noun, bytes beside them."""

from types import TracebackType
from typing import Self

from hscr.errors import SchemaOutdated, StoreError
from hscr.store.answers import Answers
from hscr.store.blobs import Blobs, open_blobs
from hscr.store.database import Database
from hscr.store.disk import Disk
from hscr.store.images import Images
from hscr.store.jobs import Jobs
from hscr.store.keys import Keys
from hscr.store.preferences import Preferences
from hscr.store.releases import Releases
from hscr.store.settings import StoreSettings


class Store:
    """Open with `Store.open(settings)`; the revision is checked, so a stale database refuses at once."""

    def __init__(self, database: Database, blobs: Blobs, disk: Disk) -> None:
        self.database = database
        self.blobs = blobs
        self.disk = disk
        self.images = Images(database, blobs)
        self.keys = Keys(database)
        self.answers = Answers(database)
        self.preferences = Preferences(database)
        self.jobs = Jobs(database)
        self.releases = Releases(database)

    @classmethod
    def open(cls, settings: StoreSettings) -> Self:
        """Raises SchemaOutdated, StoreError."""
        database = Database(settings.database)
        disk = Disk(settings.blobs, *database.folders, reserve=settings.min_free_bytes)
        try:
            database.check_revision()
        except SchemaOutdated:
            raise
        except StoreError as error:
            raise disk.trouble() or error from error
        return cls(database, open_blobs(settings), disk)

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
