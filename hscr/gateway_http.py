"""JSON and server-sent events over HTTP to one gateway, its problems turned back into exceptions."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx2

from hscr.errors import HscrError


class GatewayUnreachable(HscrError):
    """The connection could not be made, or broke."""

    slug = "gateway-unreachable"
    title = "No gateway answers"


class Event(NamedTuple):
    """A server-sent event with JSON data."""

    name: str
    data: dict[str, Any]


class Http:
    """Raises GatewayUnreachable, and for a problem document (RFC 9457) the HscrError that it names."""

    def __init__(self, url: str, key: str | None, *, timeout: float) -> None:
        self._url = url
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(base_url=url, headers=headers, timeout=timeout)

    def close(self) -> None:
        self._client.close()

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """Parameters that are None are left out."""
        return self._call("GET", path, params={name: v for name, v in query.items() if v is not None})

    def post(
        self, path: str, body: Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> dict[str, Any]:
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self._call("POST", path, json=body, headers=headers)

    def delete(self, path: str) -> dict[str, Any]:
        return self._call("DELETE", path)

    def events(self, method: str, path: str, **parts: Any) -> Iterator[Event]:
        """Closing the iterator closes the stream."""
        with self._reaching(), self._client.stream(method, path, **parts) as response:
            if not response.is_success:
                response.read()
                raise _refusal(response)
            yield from parsed(response.iter_lines())

    def _call(self, method: str, path: str, **parts: Any) -> dict[str, Any]:
        with self._reaching():
            response = self._client.request(method, path, **parts)
        if not response.is_success:
            raise _refusal(response)
        return dict(response.json())

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            raise GatewayUnreachable(
                f"{self._url}: {type(error).__name__}.",
                remedy="Start the stack with `hscr up`, or set HSCR_URL to a gateway that runs.",
            ) from error


def parsed(lines: Iterator[str]) -> Iterator[Event]:
    """Server-sent events (WHATWG HTML, section 9.2.6); comments are heartbeats."""
    name, data = "message", ""
    for line in lines:
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data += line.removeprefix("data:").strip()
        elif not line:
            if data:
                yield Event(name, json.loads(data))
            name, data = "message", ""


def stated(problem: Mapping[str, Any]) -> HscrError:
    """The error that a problem document describes."""
    slug = str(problem["type"]).rpartition("/")[2]
    return known(slug, str(problem["detail"]), str(problem.get("remedy", "")))


def known(slug: str, detail: str, remedy: str) -> HscrError:
    """The error class with this slug, or HscrError for one that only a newer gateway knows."""
    kind = next((kind for kind in _tree(HscrError) if kind.slug == slug), HscrError)
    return kind(detail, remedy=remedy)


def _refusal(response: httpx2.Response) -> HscrError:
    try:
        return stated(response.json())
    except (ValueError, KeyError, TypeError):
        return HscrError(
            f"{response.url} answered {response.status_code} and no problem document.",
            remedy="Check that HSCR_URL is the address of an hscr gateway.",
        )


def _tree(kind: type[HscrError]) -> Iterator[type[HscrError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)
