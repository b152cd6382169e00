"""A client that asks an engine for streamed answers without pause."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from hscr.engine import ChatRequest, EngineClient
from hscr.errors import HscrError
from tests.waiting import wait_until
from tests.workers.harness import png


class Traffic:
    """Asks one question of each model in turn, and keeps what was answered otherwise than before."""

    def __init__(self, url: str, texts: Mapping[str, str]) -> None:
        self.answered = 0
        self.wrong: list[str] = []
        self._url = url
        self._texts = texts
        self._over = threading.Event()

    def unharmed(self) -> None:
        """Waits for answers that were begun after this call: all, and all before, are as they were."""
        wanted = self.answered + 2 * len(self._texts)
        wait_until(lambda: self.wrong or self.answered >= wanted, seconds=60, what="further answers")
        assert self.wrong == []

    @contextmanager
    def flowing(self) -> Iterator["Traffic"]:
        thread = threading.Thread(target=lambda: asyncio.run(self._ask()))
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    async def _ask(self) -> None:
        async with EngineClient(self._url) as client:
            while not self._over.is_set():
                for model, expected in self._texts.items():
                    try:
                        text = await _streamed(client, model)
                    except HscrError as error:
                        text = repr(error)
                    if text != expected:
                        self.wrong.append(f"{model}: {text}")
                    self.answered += 1


async def _streamed(client: EngineClient, model: str) -> str:
    deltas = client.stream(ChatRequest.ask(model, "what is this?", png(1)))
    return "".join([delta.text async for delta in deltas])
