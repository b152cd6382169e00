"""What routes ask for: the state, the caller in a role, a place in the queue, and a stack for the request."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Annotated

from fastapi import Depends, Header, Query, Request
from fastapi.security import HTTPBearer

from hscr.errors import HscrError
from hscr.records import ApiKey, Role
from service.security import require_role
from service.state import State


async def _state(request: Request) -> State:  # FastAPI would run a plain function in another thread
    state = request.app.state.gateway
    assert isinstance(state, State)
    return state


Gateway = Annotated[State, Depends(_state)]

# Declares the scheme in OpenAPI; the authenticator reads the header itself, to answer with a problem.
_SCHEME = HTTPBearer(auto_error=False, bearerFormat="hscr_sk_...", description="made by `hscr keys create`")


def _caller(role: Role) -> Callable[..., Awaitable[ApiKey]]:
    async def caller(request: Request, state: Gateway, _: Annotated[object, Depends(_SCHEME)]) -> ApiKey:
        try:
            key = await state.authenticator.caller(request.headers)
            request.state.key_id = key.id
            require_role(key, role)
        except HscrError as error:
            state.metrics.rejected.labels(error.slug).inc()
            raise
        return key

    return caller


Client = Annotated[ApiKey, Depends(_caller(Role.CLIENT))]
Reviewer = Annotated[ApiKey, Depends(_caller(Role.REVIEWER))]
Operator = Annotated[ApiKey, Depends(_caller(Role.OPERATOR))]


async def _admitted(state: Gateway, _caller: Client) -> AsyncIterator[AsyncExitStack]:
    """One place among the questions in flight, freed with all the stack holds when the response has ended."""
    async with AsyncExitStack() as stack:
        try:
            state.pointer.require_fresh()
            stack.enter_context(state.admission.slot())
        except HscrError as error:
            state.metrics.rejected.labels(error.slug).inc()
            raise
        yield stack


Admitted = Annotated[AsyncExitStack, Depends(_admitted)]

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        description="The same key with the same request returns the first result; with another one, 409.",
        examples=["0b8f5e0e-3c55-4a55-9d1f-2a1c8f7f1b9e"],
    ),
]

PageLimit = Annotated[int, Query(ge=1, le=200, description="items at most")]
