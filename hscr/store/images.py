"""The bytes of images, and the rows that need them: what nothing refers to goes, what something needs stays.

Whoever adds a row puts the bytes there again inside its transaction, and bytes go only inside a transaction
that has seen no row. Writers come one after another, so no order of the two loses bytes that a row names.
"""

from collections.abc import Iterable

from sqlalchemy import Connection, or_, select

from hscr.records import now
from hscr.store.blobs import Blobs
from hscr.store.database import Database
from hscr.store.tables import images
from hscr.store.writers import removing


class Images:
    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self._blobs = blobs

    def drop_unheld(self, digests: Iterable[str]) -> list[str]:
        """Delete the bytes of those that no study holds any more. Returns their digests."""
        return [digest for digest in digests if self._drop(digest)]

    def held(self, prefix: str = "") -> set[str]:
        """Digests that begin so and that some study holds, also if their time is over by now."""
        query = select(images.c.digest).where(images.c.digest.startswith(prefix))
        with self._database.read() as connection:
            return set(connection.execute(query).scalars())

    def lost(self, digests: Iterable[str]) -> list[str]:
        """Those that a study still holds whose bytes are not there."""
        with self._database.read() as connection:
            return [each for each in digests if _lives(connection, each) and not self._blobs.exists(each)]

    def _drop(self, digest: str) -> bool:
        with self._database.write() as connection:
            removing(connection)
            if connection.execute(select(images.c.study).where(images.c.digest == digest)).first():
                return False
            self._blobs.delete(digest)
            return True


def _lives(connection: Connection, digest: str) -> bool:
    lives = or_(images.c.expires_at.is_(None), images.c.expires_at > now())
    return (
        connection.execute(select(images.c.study).where(images.c.digest == digest, lives)).first() is not None
    )
