"""What the last check of the store found, for the metrics: looked up at each scrape without holding it up."""

import asyncio

from hscr.errors import StoreError
from hscr.store.blobs import Blobs
from hscr.store.check import Findings, last_findings
from service.logs import log
from service.threads import Threads

_PATIENCE = 1.0
"""seconds; a scraper gives up after ten"""


class LastFindings:
    """`found` is what was seen last; a store that does not answer in time leaves it as it is."""

    def __init__(self, blobs: Blobs, threads: Threads) -> None:
        self.found = Findings()
        self._blobs = blobs
        self._threads = threads
        self._looking: asyncio.Task[None] | None = None

    async def look(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        await asyncio.wait({self._looking}, timeout=_PATIENCE)

    async def _look(self) -> None:
        try:
            self.found = await self._threads(last_findings, self._blobs)
        except StoreError as error:
            log().warning("findings", slug=error.slug)
