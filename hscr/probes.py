"""Is it there? Short questions to the servers of a stack, answered without raising."""

import socket
from urllib.parse import urlsplit

import httpx2


def http_ok(url: str, *, timeout: float = 2.0) -> bool:
    """Whether GET answers 2xx within `timeout` seconds."""
    try:
        return httpx2.get(url, timeout=timeout).is_success
    except httpx2.HTTPError:
        return False


def redis_trouble(url: str, *, timeout: float = 2.0) -> str | None:
    """Why the server at `redis://[user:password@]host:port/db` does not answer PING; None when it does.

    Speaks RESP over a plain socket, so that no client package is needed.
    """
    parts = urlsplit(url)
    words = [[w for w in ("AUTH", parts.username, parts.password) if w]] if parts.password else []
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 6379), timeout) as server:
            for command in [*words, ["PING"]]:
                server.sendall(_resp(command))
                reply = server.recv(512).decode(errors="replace").strip()
                if not reply.startswith("+"):
                    return reply.removeprefix("-") or "it closed the connection"
    except OSError as error:
        return str(error)
    return None


def _resp(words: list[str]) -> bytes:
    parts = [f"*{len(words)}", *(line for word in words for line in (f"${len(word.encode())}", word))]
    return ("\r\n".join(parts) + "\r\n").encode()
