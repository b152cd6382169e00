"""Submissions over kept-alive connections, each with its own Idempotency-Key, repeated until they get a 202.

Bytes are written by hand: a client library would take more of the two cores than the gateway.
"""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import uuid4

_BODY = b'{"source_ids":[]}'
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
"""between two tries: hundreds of clients at once must not keep gateways from starting"""
_SILENCE_SECONDS = 20.0
_RANDOM = random.SystemRandom()
_BROKEN = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError)


@dataclass
class Submission:
    """One request of a client: what it was, and what came of it."""

    key: str = field(default_factory=lambda: uuid4().hex)
    due: float = 0.0
    """when it should have been sent, by the monotonic clock: waiting for a connection counts"""
    seconds: float | None = None
    """until the 202; None without one"""
    job: str | None = None
    tries: int = 0


class Clients:
    """Submits to the gateways at these ports in turn and remembers everything it ever sent."""

    def __init__(self, ports: Sequence[int], secret: str) -> None:
        self.ports = ports
        self.sent: list[Submission] = []
        self._secret = secret
        self._idle: dict[int, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = defaultdict(list)

    async def closed(self, clients: int, seconds: float) -> float:
        """202s per second when each of so many clients sends its next request after the last one's answer."""
        began, first = time.monotonic(), len(self.sent)

        async def client() -> None:
            while time.monotonic() < began + seconds:
                await self.submit(Submission(due=time.monotonic()))

        await asyncio.gather(*(client() for _ in range(clients)))
        return (len(self.sent) - first) / (time.monotonic() - began)

    async def open(self, rate: float, over: asyncio.Event) -> None:
        """Send `rate` a second at exponential distances, whatever the answers, until `over`."""
        due = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while not over.is_set():
                due += _RANDOM.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(self.submit(Submission(due=due)))

    async def submit(self, submission: Submission) -> None:
        """Until it is accepted, by whichever gateway lives."""
        self.sent.append(submission)
        while submission.job is None:
            submission.tries += 1
            submission.job = await self._try(self._port(submission), submission.key)
            if submission.job is None:
                await _pause(submission)
        submission.seconds = time.monotonic() - submission.due

    async def again(self, submission: Submission) -> str:
        """The job that the same request gets now."""
        repeated = Submission(key=submission.key)
        while (job := await self._try(self._port(repeated), repeated.key)) is None:
            repeated.tries += 1
            await _pause(repeated)
        return job

    def _port(self, submission: Submission) -> int:
        return self.ports[(len(self.sent) + submission.tries) % len(self.ports)]

    async def _try(self, port: int, key: str) -> str | None:
        """The id of the job, or None for whatever is no 202."""
        idle = self._idle[port]
        try:
            async with asyncio.timeout(_SILENCE_SECONDS):
                reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
                writer.write(
                    f"POST /v1/preference-jobs HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                    f"Authorization: Bearer {self._secret}\r\nContent-Type: application/json\r\n"
                    f"Idempotency-Key: {key}\r\nContent-Length: {len(_BODY)}\r\n\r\n".encode()
                    + _BODY
                )
                status, job = await _reply(reader)
        except _BROKEN:
            while idle:  # of a gateway that is gone
                idle.pop()[1].close()
            return None
        idle.append((reader, writer))
        return job if status == 202 else None


async def _pause(submission: Submission) -> None:
    longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**submission.tries)
    await asyncio.sleep(longest * _RANDOM.uniform(0.5, 1))


async def _reply(reader: asyncio.StreamReader) -> tuple[int, str | None]:
    """Status, and the job that the header Location names."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    await reader.readexactly(int(headers["content-length"]))
    return int(lines[0].split()[1]), headers.get("location", "").rpartition("/")[2] or None
