"""One question from bytes to a kept answer: decode, choose a version, ask, keep, reply."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Self, TypeVar

from fastapi import Request

from hscr.engine import ChatDelta, ChatRequest, Message, Usage
from hscr.errors import EngineError, EngineUnavailable, Gone
from hscr.faults import fault_point
from hscr.imaging.decode import Prepared, prepare
from hscr.records import (
    Answer,
    AnswerKind,
    ApiKey,
    Provenance,
    Replica,
    Sampling,
    new_id,
)
from hscr.store.releases import BASE
from hscr.store.store import Store
from service.bodies import Upload
from service.canary import Tally
from service.logs import log
from service.pointer import ACTIVE
from service.schemas import ImageBody
from service.state import State

T = TypeVar("T")

NO_USAGE = Usage(prompt_tokens=0, completion_tokens=0)


@dataclass(frozen=True)
class Ask:
    """A checked question about one image, whichever route it came by."""

    kind: AnswerKind
    key: ApiKey
    messages: tuple[Message, ...]
    data: bytes
    sampling: Sampling
    adapter: str | None = None
    study: str | None = None
    frame: int | None = None
    window: str | None = None
    idempotency: tuple[str, str] | None = None
    id: str = field(default_factory=lambda: new_id("ans"))

    @classmethod
    def of_upload(
        cls,
        kind: AnswerKind,
        key: ApiKey,
        message: Message,
        upload: Upload[Any],
        idempotency_key: str | None,
    ) -> Self:
        """A single turn about an uploaded image."""
        body: ImageBody = upload.body
        return cls(
            kind=kind,
            key=key,
            messages=(message,),
            data=upload.data,
            sampling=body.sampling,
            adapter=body.adapter,
            study=body.study,
            frame=body.frame,
            window=body.window,
            idempotency=(idempotency_key, upload.digest) if idempotency_key else None,
        )

    @property
    def question(self) -> str:
        """As it is kept: a single turn's text, or the whole conversation."""
        if len(self.messages) == 1:
            return self.messages[0].text
        return "\n".join(f"{message.role}: {message.text}" for message in self.messages)


@dataclass(frozen=True)
class Finished:
    answer: Answer
    usage: Usage


@dataclass
class Making:
    """An answer being made by one replica with one version."""

    state: State
    ask: Ask
    prepared: Prepared
    version: str | None
    replica: Replica
    deltas: AsyncIterator[ChatDelta]
    deadline: float
    tally: Tally
    _texts: list[str] = field(default_factory=list)
    _finish_reason: str = "stop"
    _usage: Usage = NO_USAGE

    async def pieces(self) -> AsyncIterator[str | Finished]:
        """The texts as they come, then, once it is kept, the answer.

        Raises EngineInterrupted, EngineUnavailable past the deadline, StoreError.
        """
        try:
            async for delta in self.deltas:
                if monotonic() > self.deadline:
                    raise _too_slow(self.state)
                self._texts.append(delta.text)
                self._finish_reason = delta.finish_reason or self._finish_reason
                self._usage = delta.usage or self._usage
                if delta.text:
                    yield delta.text
                    fault_point("answer.streaming")
        except EngineError:
            self.tally.broke_off(self.version)
            raise
        yield await kept(
            self.state, self.ask, self.prepared, self.version, self.replica,
            text="".join(self._texts), finish_reason=self._finish_reason, usage=self._usage,
        )  # fmt: skip


async def answered(state: State, ask: Ask, stack: AsyncExitStack) -> Finished:
    """A whole answer. The version stays counted until `stack` closes."""
    prepared = await _prepared(state, ask)
    deadline = monotonic() + state.settings.request_deadline
    version = await _held(state, ask, prepared, stack)
    fault_point("answer.version-held")
    with state.pointer.tally.asking(version):
        async with _in_time(state, deadline):
            replica, result = await state.engines.chat(version, _request(ask, prepared))
    return await kept(
        state, ask, prepared, version, replica,
        text=result.text, finish_reason=result.finish_reason, usage=result.usage,
    )  # fmt: skip


async def begun(state: State, ask: Ask, stack: AsyncExitStack) -> Making:
    """A streamed answer whose first text is here, so that a refusal still has its own HTTP status."""
    deadline = monotonic() + state.settings.request_deadline
    prepared = await _prepared(state, ask)
    version = await _held(state, ask, prepared, stack)
    tally = state.pointer.tally
    with tally.asking(version):
        async with _in_time(state, deadline):
            stream = await state.engines.stream(version, _request(ask, prepared), stack)
    return Making(state, ask, prepared, version, stream.replica, stream.deltas(), deadline, tally)


async def repeated(state: State, ask: Ask) -> Answer | None:
    """The answer that the same Idempotency-Key got before. Raises IdempotencyConflict."""
    if ask.idempotency is None:
        return None
    return await state.db(state.store.answers.repeated, ask.key.id, *ask.idempotency)


class ClientGone(Exception):
    """The client closed its connection before there was anything to send."""


async def while_connected(state: State, request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await the work, or stop it as soon as the client leaves. Raises ClientGone."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            state.metrics.aborted.inc()
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def kept(
    state: State,
    ask: Ask,
    prepared: Prepared,
    version: str | None,
    replica: Replica,
    *,
    text: str,
    finish_reason: str,
    usage: Usage,
) -> Finished:
    """Commit the answer with its provenance; nothing that follows can lose it."""
    ttl = None if ask.key.train_consent else state.settings.image_ttl

    def keep(store: Store) -> Answer:
        answer = Answer(
            id=ask.id,
            kind=ask.kind,
            study=ask.study or prepared.study or new_id("study"),
            project=ask.key.project,
            image=prepared.image,
            question=ask.question,
            text=text,
            finish_reason=finish_reason,
            provenance=_provenance(store, ask, prepared, version, replica),
            key_id=ask.key.id,
            train_consent=ask.key.train_consent,
        )
        put = partial(store.blobs.put, prepared.png)
        put()  # before the transaction, which is to find it done
        fault_point("answer.image")
        return store.answers.add(answer, image_ttl=ttl, idempotency=ask.idempotency, put_image=put)

    fault_point("answer.made")
    answer = await state.db(keep, state.store)
    fault_point("answer.kept")
    _account(state, answer, usage)
    return Finished(answer, usage)


def _provenance(
    store: Store, ask: Ask, prepared: Prepared, version: str | None, replica: Replica
) -> Provenance:
    return Provenance(
        model=replica.model,
        model_digest=replica.model_digest,
        adapter=version,
        adapter_digest=None if version is None else store.releases.adapter(version).digest,
        recipe=prepared.image.recipe,
        template_digest=replica.template_digest,
        sampling=ask.sampling,
        numeric_mode=replica.numeric_mode,
        engine=replica.engine,
    )


def _account(state: State, answer: Answer, usage: Usage) -> None:
    version = answer.provenance.adapter or BASE
    state.metrics.answers.labels(answer.kind, version).inc()
    state.metrics.tokens.labels("prompt").inc(usage.prompt_tokens)
    state.metrics.tokens.labels("completion").inc(usage.completion_tokens)
    log().info("answered", answer=answer.id, kind=answer.kind, version=version)


async def _prepared(state: State, ask: Ask) -> Prepared:
    if ask.study is not None and await state.db(state.store.answers.buried, ask.study):
        raise Gone("This study was deleted.", remedy="Use another name for a new study.")
    return await state.images(
        prepare,
        ask.data,
        limits=state.settings.limits,
        frame=ask.frame,
        window=ask.window,
        secret=state.study_key,
    )


async def _held(state: State, ask: Ask, prepared: Prepared, stack: AsyncExitStack) -> str | None:
    """Choose and count a version. Raises NotFound for one that never was, Conflict for one not loaded.

    Whoever asks about one study is answered by one version throughout a canary: the draw is by the key and
    the study, or the image where no study is known.
    """
    base_names = {replica.model for replica in state.engines.replicas}
    name = BASE if ask.adapter in base_names else ask.adapter
    pointed = {None, ACTIVE, BASE, state.pointer.pointer.active, state.pointer.pointer.previous}
    if name not in pointed:
        await state.db(state.store.releases.adapter, name)
    sticky = f"{ask.key.id}\0{ask.study or prepared.study or prepared.image.digest}"
    return stack.enter_context(state.pointer.hold(name, sticky))


@asynccontextmanager
async def _in_time(state: State, deadline: float) -> AsyncIterator[None]:
    """Raises EngineUnavailable when the block lasts beyond the deadline, in the clock's seconds."""
    try:
        async with asyncio.timeout(deadline - monotonic()):
            yield
    except TimeoutError as error:
        raise _too_slow(state) from error


def _request(ask: Ask, prepared: Prepared) -> ChatRequest:
    return ChatRequest(model="", messages=ask.messages, image=prepared.png, sampling=ask.sampling)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_slow(state: State) -> EngineUnavailable:
    return EngineUnavailable(
        f"The answer was not ready within {state.settings.request_deadline:g} seconds.",
        remedy="Try again, or lower `max_tokens`.",
    )
