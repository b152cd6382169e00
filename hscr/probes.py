"""Is it there? Short questions to the servers of a stack, answered without raising."""

import socket
import ssl
from urllib.parse import SplitResult, parse_qsl, urlsplit

import httpx2


def http_ok(url: str, *, timeout: float = 2.0) -> bool:
    """Whether GET answers 2xx within `timeout` seconds."""
    try:
        return httpx2.get(url, timeout=timeout).is_success
    except httpx2.HTTPError:
        return False


def redis_trouble(url: str, *, timeout: float = 2.0) -> str | None:
    """Why the server at `redis://[user:password@]host:port/db` does not answer PING; None when it does.

    Speaks RESP over a socket, so that no client package is needed; `rediss://…?ssl_ca_certs=PATH` with TLS.
    """
    parts = urlsplit(url)
    words = [[w for w in ("AUTH", parts.username, parts.password) if w]] if parts.password else []
    try:
        with _connected(parts, timeout) as server:
            for command in [*words, ["PING"]]:
                server.sendall(_resp(command))
                reply = server.recv(512).decode(errors="replace").strip()
                if not reply.startswith("+"):
                    return reply.removeprefix("-") or "it closed the connection"
    except OSError as error:
        return str(error)
    return None


def _connected(url: SplitResult, timeout: float) -> socket.socket:
    address = (url.hostname or "127.0.0.1", url.port or 6379)
    if url.scheme != "rediss":
        return socket.create_connection(address, timeout)
    options = dict(parse_qsl(url.query))
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
    if options.get("ssl_cert_reqs", "required").lower() in {"none", "cert_none"}:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(socket.create_connection(address, timeout), server_hostname=address[0])


def _resp(words: list[str]) -> bytes:
    parts = [f"*{len(words)}", *(line for word in words for line in (f"${len(word.encode())}", word))]
    return ("\r\n".join(parts) + "\r\n").encode()
