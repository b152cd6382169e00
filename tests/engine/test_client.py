"""How the client names what goes wrong, against servers that really do go wrong."""

import asyncio
import json
import re
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest

from hscr.engine import KEEP_ALIVE_SECONDS, EngineClient
from hscr.errors import EngineError, EngineInterrupted, EngineRejected, EngineUnavailable
from tests.engine.conftest import ask

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def serving(reply: bytes, *, linger: float = 0.0, timeout: float = 5.0):
    """A server that answers every request with these raw bytes and hangs up after `linger` seconds."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        header = (await reader.readuntil(b"\r\n\r\n")).lower()
        announced = re.search(rb"content-length: (\d+)", header)
        await reader.readexactly(int(announced[1]) if announced else 0)
        writer.write(reply)
        await writer.drain()
        await asyncio.sleep(linger)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        async with EngineClient(f"http://{host}:{port}/", timeout=timeout) as client:
            yield client
    finally:
        server.close()


def http(status: int, body: bytes, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def events(*frames: str) -> bytes:
    body = "".join(f"data: {frame}\n\n" for frame in frames)
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body.encode()


def frame(text: str) -> str:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    return json.dumps({"model": "m", "choices": [choice]})


async def test_nobody_there():
    async with EngineClient("http://127.0.0.1:9") as client:
        with pytest.raises(EngineUnavailable, match=r"127\.0\.0\.1:9"):
            await client.chat(ask())
        assert not await client.health()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, EngineRejected),
        (404, EngineRejected),
        (429, EngineRejected),
        (500, EngineError),
        (503, EngineUnavailable),
    ],
)
async def test_a_status_becomes_its_error(status, kind):
    body = json.dumps({"error": {"message": "because", "type": "T", "param": None, "code": status}}).encode()
    async with serving(http(status, body)) as client:
        with pytest.raises(kind, match="because") as failure:
            await client.chat(ask())
        assert type(failure.value) is kind
        if kind is EngineRejected:
            assert failure.value.status == status


async def test_a_connection_lost_before_the_reply():
    async with serving(b"") as client:
        with pytest.raises(EngineUnavailable):
            await client.chat(ask())
        with pytest.raises(EngineUnavailable):
            await anext(client.stream(ask()))


async def test_an_answer_that_never_comes():
    async with serving(b"", linger=3, timeout=0.2) as client:
        with pytest.raises(EngineUnavailable, match="Timeout"):
            await client.chat(ask())


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}', b"[]"])
async def test_a_reply_that_is_not_the_protocol(body):
    async with serving(http(200, body)) as client:
        with pytest.raises(EngineError, match="OpenAI") as failure:
            await client.chat(ask())
        assert type(failure.value) is EngineError
        with pytest.raises(EngineError, match="OpenAI"):
            await client.models()


@pytest.mark.parametrize(
    "tail",
    [(), ('{"error": {"message": "boom", "code": 500}}',)],
    ids=["connection closed", "error frame"],
)
async def test_a_stream_that_breaks_off(tail):
    async with serving(events(frame("ye"), frame("s"), *tail)) as client:
        stream = client.stream(ask())
        assert [(await anext(stream)).text for _ in range(2)] == ["ye", "s"]
        with pytest.raises(EngineInterrupted):
            await anext(stream)


async def test_a_stream_that_falls_silent():
    async with serving(events(frame("yes")), linger=3, timeout=0.3) as client:
        stream = client.stream(ask())
        await anext(stream)
        with pytest.raises(EngineInterrupted):
            await anext(stream)


async def test_leading_white_space_is_the_templates():
    async with serving(events(frame(" "), frame(" a"), frame(" b"), "[DONE]")) as client:
        assert [delta.text async for delta in client.stream(ask())] == ["", "a", " b"]


async def test_a_connection_that_the_server_may_have_closed_is_not_used_again():
    connections, reply = [], http(200, b'{"version": "1"}')

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        while not reader.at_eof() and (await reader.readline()).strip():
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server, EngineClient(f"http://{host}:{port}") as client:
        for _ in range(2):
            await client.version()
        assert len(connections) == 1
        await asyncio.sleep(KEEP_ALIVE_SECONDS + 0.2)
        await client.version()
        assert len(connections) == 2


def test_the_client_needs_no_torch():
    code = "import hscr.engine, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
