"""An engine whose every byte a test decides, on a real socket; it notes when its clients leave."""

import asyncio
import json
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class Exchange:
    """One request and what is done about it. Times are of the monotonic clock, in seconds."""

    def __init__(self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.body = body
        self.model: str = body["model"]
        self.asked_at = monotonic()
        self.left_at: float | None = None
        self.written = 0
        self._writer = writer
        self._leaving = asyncio.ensure_future(self._watch(reader))

    @property
    def left(self) -> bool:
        """Whether the client hung up before the reply was whole."""
        return self.left_at is not None

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionResetError):
            await reader.read()
        self.left_at = monotonic()

    async def until_left(self) -> None:
        await self._leaving

    async def write(self, data: bytes) -> None:
        """As an engine does: the next piece waits until the network took this one."""
        self._writer.write(data)
        await self._writer.drain()
        self.written += len(data)

    async def status(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        head = f"HTTP/1.1 {code} X\r\nContent-Type: application/json\r\nConnection: close\r\n"
        await self.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    async def begin(self) -> None:
        await self.write(_STREAM)

    async def delta(self, text: str, finish_reason: str | None = None) -> None:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
        await self.write(f"data: {json.dumps({'model': self.model, 'choices': [choice]})}\n\n".encode())

    async def answer(self, text: str) -> None:
        """As it was asked for: whole or streamed."""
        if self.body.get("stream"):
            await self.begin()
            await self.delta(text, "stop")
            await self.write(b"data: [DONE]\n\n")
            return
        choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        await self.status(200, {"model": self.model, "choices": [choice], "usage": usage})

    async def cut(self) -> None:
        """Half of a reply, then nothing more."""
        if self.body.get("stream"):
            await self.begin()
            await self.delta("half")
        else:
            await self.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices": [')
        self._writer.close()


Script = Callable[[Exchange], Awaitable[None]]


async def agrees(exchange: Exchange) -> None:
    await exchange.answer(f"{exchange.model} says yes.")


async def fails(exchange: Exchange) -> None:
    await exchange.status(503, {"error": {"message": "busy"}})


async def breaks_off(exchange: Exchange) -> None:
    await exchange.cut()


async def says_nothing(exchange: Exchange) -> None:
    """Until its client leaves."""
    await exchange.until_left()


async def falls_silent(exchange: Exchange) -> None:
    """After the first word, until its client leaves."""
    await exchange.begin()
    await exchange.delta("word")
    await exchange.until_left()


class ScriptedEngine:
    """`script` decides what the next request meets; `exchanges` tells what the earlier ones met."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.exchanges: list[Exchange] = []
        self.address = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        assert length is not None
        exchange = Exchange(json.loads(await reader.readexactly(int(length[1]))), reader, writer)
        self.exchanges.append(exchange)
        try:
            await self.script(exchange)
        except ConnectionError:
            await exchange.until_left()
        finally:
            exchange._leaving.cancel()
            writer.close()


@contextmanager
def scripted(script: Script = agrees) -> Iterator[ScriptedEngine]:
    """In a thread of its own, so that a test may block while the engine goes on."""
    engine, loop = ScriptedEngine(script), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    serving = asyncio.run_coroutine_threadsafe(asyncio.start_server(engine.serve, "127.0.0.1", 0), loop)
    server = serving.result(timeout=10)
    host, port = server.sockets[0].getsockname()
    engine.address = f"http://{host}:{port}"
    try:
        yield engine
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()


async def _stop(server: asyncio.Server) -> None:
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
