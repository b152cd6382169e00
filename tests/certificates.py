"""A private certificate authority, a server's certificate of it, and TLS before a server that speaks none."""

import asyncio
import ssl
import subprocess
import threading
from pathlib import Path
from typing import NamedTuple, Self

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")


class Certificates(NamedTuple):
    """PEM files: of the authority, and of a server that is called localhost and nothing else."""

    authority: Path
    certificate: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> Self:
        folder.mkdir()
        made = cls(folder / "ca.crt", folder / "server.crt", folder / "server.key")
        own = ("-keyout", str(folder / "ca.key"), "-out", str(made.authority))
        _openssl(*own, "-subj", "/CN=a private CA", "-addext", "keyUsage=critical,keyCertSign")
        signed = ("-CA", str(made.authority), "-CAkey", str(folder / "ca.key"), "-subj", "/CN=localhost")
        extensions = ("-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=CA:FALSE")
        _openssl("-keyout", str(made.key), "-out", str(made.certificate), *signed, *extensions)
        return made


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", "req", "-x509", *_KEY, *arguments], check=True, capture_output=True)


class TlsFront:
    """Ends TLS on a port of its own and hands the bytes on, as stunnel or a service mesh does."""

    def __init__(self, certificates: Certificates, port_behind: int) -> None:
        self.port = 0
        self._behind = port_behind
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificates.certificate, certificates.key)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        listening = asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        server = asyncio.run_coroutine_threadsafe(listening, self._loop).result(30)
        self.port = server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", self._behind)
        await asyncio.gather(_pass_on(client, to_server), _pass_on(server, to_client))


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """What ends or breaks on one side does so on the other."""
    try:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
    except ConnectionError:
        target.transport.abort()
    else:
        target.close()
