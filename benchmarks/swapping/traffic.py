"""Streamed questions to several gateways at a steady rate, and what became of each."""

import asyncio
import json
import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import aiohttp

from benchmarks.swapping.versions import MAX_TOKENS, Question


@dataclass(frozen=True)
class Asked:
    """One request. Times are of the wall clock, in seconds."""

    question: Question
    gateway: int
    start: float
    first: float | None
    """its first text came"""
    end: float
    text: str | None
    """None: no whole answer"""
    failure: str | None = None
    """slug of the problem, or what broke"""

    @property
    def version(self) -> str | None:
        """Told by the text alone; None for a failure and for a text that no version says."""
        return None if self.text is None else self.question.version(self.text)

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.start


class Traffic:
    """Every request of a run, in the order in which they ended."""

    def __init__(self, urls: Sequence[str], key: str, questions: Sequence[Question]) -> None:
        self.asked: list[Asked] = []
        self._urls, self._questions = list(urls), list(questions)
        self._headers = {"Authorization": f"Bearer {key}"}
        self._bodies = [json.dumps(_body(question)).encode() for question in questions]
        self._number = count()

    async def capacity(self, streams: int, seconds: float) -> float:
        """Answers per second that so many clients get who ask again as soon as they are answered."""
        until = time.time() + seconds

        async def client(session: aiohttp.ClientSession) -> None:
            while time.time() < until:
                await self._ask(session)

        before = len(self.asked)
        started = time.time()
        async with self._session() as session:
            await asyncio.gather(*(client(session) for _ in range(streams)))
        answers = sum(one.text is not None for one in self.asked[before:])
        return answers / (time.time() - started)

    async def run(self, streams: int, rate: float, until: asyncio.Event) -> None:
        """So many clients, together at `rate` requests per second; none asks again before it is answered.

        Returns when `until` is set and every request under way has ended.
        """
        period = streams / rate

        async def client(session: aiohttp.ClientSession, due: float) -> None:
            while not until.is_set():
                await asyncio.sleep(due - time.monotonic())
                await self._ask(session)
                due = max(due + period, time.monotonic())

        started = time.monotonic()
        async with self._session() as session:
            await asyncio.gather(*(client(session, started + n / rate) for n in range(streams)))

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=120)
        return aiohttp.ClientSession(
            headers=self._headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
        )

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        number = next(self._number)
        # Each question goes to each gateway in turn.
        at, of = number % len(self._questions), number // len(self._questions)
        gateway = (at + of) % len(self._urls)
        start, first, text, failure = time.time(), None, None, None
        try:
            async with session.post(
                f"{self._urls[gateway]}/v1/vqa",
                data=self._bodies[at],
                headers={"Content-Type": "application/json"},
            ) as reply:
                if reply.status != 200:
                    failure = str((await reply.json())["type"]).rpartition("/")[2]
                else:
                    first, text, failure = await _stream(reply)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            failure = type(error).__name__
        one = Asked(self._questions[at], gateway, start, first, time.time(), text, failure)
        self.asked.append(one)


async def _stream(reply: aiohttp.ClientResponse) -> tuple[float | None, str | None, str | None]:
    """When the first text came; the whole answer or how it broke off."""
    first, name = None, ""
    async for line in reply.content:
        if line.startswith(b"event:"):
            name = line.removeprefix(b"event:").strip().decode()
        elif line.startswith(b"data:"):
            first = first or time.time()
            data = json.loads(line.removeprefix(b"data:"))
            if name == "answer":
                return first, str(data["text"]), None
            if name == "error":
                return first, None, str(data["type"]).rpartition("/")[2]
    return first, None, "ended without an answer"


def _body(question: Question) -> dict[str, object]:
    return {
        "image": b64encode(question.image).decode(),
        "question": question.text,
        "sampling": {"temperature": 0.0, "max_tokens": MAX_TOKENS},
        "stream": True,
    }
