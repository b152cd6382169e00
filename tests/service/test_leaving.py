"""Clients that leave or stop reading: the engine learns of it, and the gateway keeps nothing for them."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from urllib.parse import urlsplit

import pytest

from tests.service.conftest import IMAGE, QUESTION, b64, idle, replica
from tests.service.scripted import Exchange, falls_silent, says_nothing, scripted
from tests.waiting import wait_until

PIECE = "x" * 4096
PIECES = 32_768
"""Of 4 KiB: 128 MiB, more than all sockets on the way can hold."""

HELD = 32 * 2**20
"""More than the kernel's buffers of two connections take; the gateway's own add up to some hundred KiB."""


@contextmanager
def raw_request(url: str, *, receive_buffer: int | None = None, **body) -> Iterator[socket.socket]:
    at = urlsplit(url)
    data = json.dumps({"image": b64(IMAGE), "question": QUESTION, **body}).encode()
    head = f"POST /v1/vqa HTTP/1.1\r\nHost: {at.netloc}\r\nContent-Type: application/json\r\n"
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect((at.hostname, at.port))
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        yield connection


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_learns_that_a_client_left_while_it_is_silent(serve, store, stream):
    with scripted(falls_silent if stream else says_nothing) as engine:
        store.releases.report_replica(replica(engine.address, loaded=()))
        gateway = serve()
        with raw_request(gateway.url, stream=stream) as connection:
            wait_until(lambda: engine.exchanges, what="the engine's request")
            while stream and b"word" not in connection.recv(4096):
                pass
            assert not engine.exchanges[0].left
            left_at = monotonic()
        wait_until(lambda: engine.exchanges[0].left, what="the disconnect at the engine")
        after = engine.exchanges[0].left_at - left_at
        print(f"client's disconnect at the engine after {1000 * after:.1f} ms (stream={stream})")  # noqa: T201
        wait_until(lambda: gateway.metric("hscr_aborted_total") == 1, what="the gateway's count")
        assert store.answers.page() == []


def test_a_client_that_stops_reading_holds_neither_memory_nor_a_version(serve, store):
    async def floods(exchange: Exchange) -> None:
        await exchange.begin()
        for _ in range(PIECES):
            await exchange.delta(PIECE)

    with scripted(floods) as engine:
        store.releases.report_replica(replica(engine.address, loaded=()))
        gateway = serve(client_silence=1.0)
        with raw_request(gateway.url, receive_buffer=4096, stream=True) as connection:
            wait_until(lambda: engine.exchanges, what="the engine's request")
            assert gateway.get("/livez").status_code == 200
            wait_until(lambda: engine.exchanges[0].left, what="the end of the stream at the engine")
            written = engine.exchanges[0].written
            print(f"{written / 2**20:.1f} of {PIECES * len(PIECE) / 2**20:.0f} MiB taken")  # noqa: T201
            assert written < HELD
            wait_until(lambda: gateway.metric("hscr_in_flight") == 1, what="only the scrape in flight")
            wait_until(lambda: idle(store, "base"), what="the version's release")
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        assert received.startswith(b"HTTP/1.1 200")
        assert not received.endswith(b"0\r\n\r\n"), "the last chunk would say that the answer is whole"
        assert b"event: answer" not in received
        assert store.answers.page() == []
