"""Pure ASGI layers around the routes: identity of a request, its account, its size, and its last resort."""

from time import monotonic
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hscr.records import new_id
from service.errors import InternalError, problem, problem_response
from service.logs import begin_request, log, where
from service.metrics import Metrics


class Account:
    """Gives each request an id, and afterwards one log line and its metrics. Outermost."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identifier = new_id("req")
        begin_request(identifier)
        began, status = monotonic(), 499  # nginx's number for a client that left before any answer

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = identifier
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, counted_send)
            finally:
                self._settle(scope, status, monotonic() - began)

    def _settle(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if route != "unmatched" else "any"
        self._metrics.requests.labels(method, route, str(status)).inc()
        self._metrics.latency.labels(route).observe(seconds)
        key = scope.get("state", {}).get("key_id")
        account: dict[str, Any] = {"method": scope["method"], "route": route, "status": status, "key": key}
        log().info("request", **account, ms=round(1000 * seconds, 1))


class LastResort:
    """Turns an exception nobody meant into a problem without internals; its place in the code is logged."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception as error:
            if scope["type"] != "http":
                raise
            log().error("unexpected", error=type(error).__name__, at=where(error))
            if started:
                return  # the server sees an unfinished body and cuts the connection
            await problem_response(problem(_INTERNAL, scope["path"]))(scope, receive, send)


_INTERNAL = InternalError(
    "Something failed that should not.", remedy="Give the request_id to whoever runs this gateway."
)


class BodyLimit:
    """Refuses a body by its stated length before reading it, and by its real length while reading."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "0")
        too_long = not stated.isdecimal() or int(stated) > self._limit
        received = 0

        async def bounded_receive() -> Message:
            nonlocal received
            if too_long:
                raise self._too_large()
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._too_large()
            return message

        await self._app(scope, bounded_receive, send)

    def _too_large(self) -> HTTPException:
        # FastAPI passes an HTTPException through where it would turn any other error of a body into 400.
        return HTTPException(413, f"The request body is larger than {self._limit / 1e6:g} MB.")
