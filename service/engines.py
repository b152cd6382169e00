"""The engines this copy may ask: those whose agents report them, the least busy first."""

import math
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from time import monotonic

from hscr.engine import ChatDelta, ChatRequest, ChatResult, EngineClient
from hscr.errors import (
    EngineError,
    EngineInterrupted,
    EngineRejected,
    EngineUnavailable,
    InvalidInput,
    Overloaded,
)
from hscr.records import Replica
from service.logs import log
from service.metrics import Metrics
from service.replicas import Replicas
from service.settings import GatewaySettings

ATTEMPTS = 2
LONGEST_RETRY_AFTER = 60
_TOO_MANY = 429


@dataclass(frozen=True)
class Stream:
    """An answer being made: its first piece is here, so an engine that refuses has done so by now."""

    replica: Replica
    first: ChatDelta
    rest: AsyncIterator[ChatDelta]

    async def deltas(self) -> AsyncIterator[ChatDelta]:
        """Raises EngineInterrupted when the replica goes away."""
        yield self.first
        async for delta in self.rest:
            yield delta


class EnginePool:
    """A version is routed only to ready replicas that report it loaded and probed."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._view = Replicas(settings, metrics)
        self._clients: dict[str, EngineClient] = {}
        self._mean_seconds = 1.0

    @property
    def replicas(self) -> list[Replica]:
        return self._view.all

    async def refresh(self, replicas: list[Replica], desired: Collection[str]) -> None:
        """Replace the view, and close the connections to what has gone and no longer answers anything."""
        self._view.refresh(replicas, desired)
        for address in [each for each in self._clients if self._view.abandoned(each)]:
            await self._clients.pop(address).close()

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()

    def serving(self, version: str | None) -> list[Replica]:
        """Ready replicas that have the version (None: the base model), the least outstanding first."""
        return self._view.serving(version)

    def retry_after(self) -> int:
        """Whole seconds until requests under way will have made room, judged by how long recent ones took."""
        return min(LONGEST_RETRY_AFTER, math.ceil(self._mean_seconds))

    async def chat(self, version: str | None, request: ChatRequest) -> tuple[Replica, ChatResult]:
        """A whole answer, asked for once more of another replica when the first gave none.

        That holds even when the first broke off in the middle of its reply: nothing of it was passed on, an
        engine keeps nothing of a request, and only a complete answer is kept, once, under its id.

        Raises Overloaded, EngineUnavailable, EngineError, InvalidInput.
        """
        for replica in self._attempts(version):
            began = monotonic()
            try:
                with self._view.asked(replica):
                    result = await self._client(replica).chat(_named(request, replica, version))
            except EngineError as error:
                self._check_retriable(error, replica)
            else:
                self._succeeded(replica, began)
                return replica, result
        raise _nobody(version)

    async def stream(self, version: str | None, request: ChatRequest, stack: AsyncExitStack) -> Stream:
        """An answer in pieces. Until `stack` closes, the request is counted and its connection held.

        Raises as `chat` does. Nothing is asked again once there is text.
        """
        for replica in self._attempts(version):
            try:
                async with AsyncExitStack() as attempt:
                    attempt.enter_context(self._view.asked(replica))
                    asked = _named(request, replica, version)
                    deltas = await attempt.enter_async_context(_closing(self._client(replica).stream(asked)))
                    began = monotonic()
                    first = await _first(deltas, asked.model)
                    self._metrics.first_text.observe(monotonic() - began)
                    stack.push_async_exit(attempt.pop_all())
                    return Stream(replica, first, self._watched(replica, deltas, began))
            except EngineError as error:
                self._check_retriable(error, replica)
        raise _nobody(version)

    async def _watched(
        self, replica: Replica, deltas: AsyncIterator[ChatDelta], began: float
    ) -> AsyncIterator[ChatDelta]:
        """The rest of a stream, whose end tells how its replica does. Raises EngineInterrupted."""
        try:
            async for delta in deltas:
                yield delta
        except EngineError as error:
            self._view.failed(replica)
            raise _interrupted(error) from error
        self._succeeded(replica, began)

    def _succeeded(self, replica: Replica, began: float) -> None:
        self._mean_seconds += 0.1 * (monotonic() - began - self._mean_seconds)
        self._view.succeeded(replica)

    def _attempts(self, version: str | None) -> Iterator[Replica]:
        """Raises Overloaded when even the least busy replica is full."""
        tried: set[str] = set()
        while len(tried) < ATTEMPTS:
            replica = next(iter(self._view.serving(version, without=tried)), None)
            if replica is None:
                return
            if self._view.full(replica):
                raise self._full()
            if tried:
                self._metrics.retried.inc()
            tried.add(replica.id)
            yield replica

    def _check_retriable(self, error: EngineError, replica: Replica) -> None:
        """A replica that went away or restarted may be replaced; a refusal would be repeated."""
        status = error.status if isinstance(error, EngineRejected) else None
        log().warning("engine_failed", replica=replica.id, error=error.slug, status=status)
        if status is None:
            self._view.failed(replica)
        if isinstance(error, EngineUnavailable | EngineInterrupted) or status == 404:
            return
        if status == _TOO_MANY:
            raise self._full() from error
        if status is not None:
            raise InvalidInput(
                "The engine refused the request.",
                remedy="Shorten the question or the conversation, or lower `max_tokens`.",
            ) from error
        raise EngineError(
            "The engine failed on this request.", remedy="Try again; if it lasts, read the engine's log."
        ) from error

    def _full(self) -> Overloaded:
        self._metrics.rejected.labels(Overloaded.slug).inc()
        return Overloaded(
            "Every engine has as many questions as it can take.",
            remedy="Try again after the seconds in Retry-After.",
            retry_after=self.retry_after(),
        )

    def _client(self, replica: Replica) -> EngineClient:
        if replica.address not in self._clients:
            self._clients[replica.address] = EngineClient(
                replica.address,
                timeout=self._settings.engine_silence,
                connect_timeout=self._settings.engine_connect_timeout,
            )
        return self._clients[replica.address]


def _closing(deltas: AsyncIterator[ChatDelta]) -> aclosing[AsyncGenerator[ChatDelta]]:
    """The client's stream is a generator: closing it ends the request in the engine."""
    assert isinstance(deltas, AsyncGenerator)
    return aclosing(deltas)


async def _first(deltas: AsyncIterator[ChatDelta], model: str) -> ChatDelta:
    """The first piece that says something: before it, nothing was produced and a retry is harmless."""
    async for delta in deltas:
        if delta.text or delta.finish_reason:
            return delta
    return ChatDelta(model=model, finish_reason="stop")


def _named(request: ChatRequest, replica: Replica, version: str | None) -> ChatRequest:
    return request.model_copy(update={"model": version or replica.model})


def _nobody(version: str | None) -> EngineUnavailable:
    return EngineUnavailable(
        f"No replica could answer with {version or 'the base model'}.",
        remedy="Try again shortly; `hscr status` shows the replicas and what keeps them.",
    )


def _interrupted(error: EngineError) -> EngineInterrupted:
    log().warning("engine_interrupted", error=error.slug)
    return EngineInterrupted("The engine went away in the middle of the answer.", remedy="Ask again.")
