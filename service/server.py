"""The gateway's end: not ready, then deaf, then gone once what it had begun is done."""

import gc
import socket
import time
from types import FrameType

import uvicorn

from service.state import Leaving


class Server(uvicorn.Server):
    """uvicorn's server, which tells balancers that it leaves before it refuses connections.

    The first signal makes `/readyz` fail and, `notice` seconds later, closes the listening sockets; requests
    then have the configuration's graceful time-out to end. A second signal ends them at once.
    """

    def __init__(self, config: uvicorn.Config, leaving: Leaving, *, notice: float) -> None:
        super().__init__(config)
        self._leaving = leaving
        self._notice = notice
        self._deaf_at = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by the server once its event loop runs."""
        await super().startup(sockets)
        # What lives as long as the process is not looked through again: a collection of its 180,000 objects
        # takes 60 to 110 ms, and every request waits.
        gc.collect()
        gc.freeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        if self._leaving.begun or not self.started:
            self.force_exit = True
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)
        self._leaving.begun = True
        self._deaf_at = time.monotonic() + self._notice

    async def on_tick(self, counter: int) -> bool:
        """Whether to shut down; called several times a second."""
        return await super().on_tick(counter) or time.monotonic() >= self._deaf_at
