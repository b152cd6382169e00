"""What routes ask for: the state, the caller in a role, a place in the queue, and a stack for the request."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Annotated

from fastapi import Depends, Header, Query, Request
from fastapi.security import HTTPBearer

from hscr.errors import HscrError
from hscr.records import ApiKey, Role
from service.security import require_role
from service.state import State


def state_of(request: Request) -> State:
    """For dependencies: FastAPI walks through all that one depends on, once for each that depends on it."""
    state = request.app.state.gateway
    assert isinstance(state, State)
    return state


async def _state(request: Request) -> State:  # FastAPI would run a plain function in another thread
    return state_of(request)


Gateway = Annotated[State, Depends(_state)]

# Declares the scheme in OpenAPI; the authenticator reads the header itself, to answer with a problem.
_SCHEME = HTTPBearer(auto_error=False, bearerFormat="hscr_sk_...", description="made by `hscr keys create`")


@contextmanager
def _refusals_counted(state: State) -> Iterator[None]:
    try:
        yield
    except HscrError as error:
        state.metrics.rejected.labels(error.slug).inc()
        raise


async def _caller(request: Request, _: Annotated[object, Depends(_SCHEME)]) -> ApiKey:
    """Looked up once for a request, however many of its dependencies ask."""
    state = state_of(request)
    with _refusals_counted(state):
        key = await state.authenticator.caller(request.headers)
    request.state.key_id = key.id
    return key


Client = Annotated[ApiKey, Depends(_caller)]
"""Whoever has a key: no role is below this one."""


def _in_role(role: Role) -> Callable[..., Awaitable[ApiKey]]:
    async def caller(request: Request, key: Client) -> ApiKey:
        with _refusals_counted(state_of(request)):
            require_role(key, role)
        return key

    return caller


Reviewer = Annotated[ApiKey, Depends(_in_role(Role.REVIEWER))]
Operator = Annotated[ApiKey, Depends(_in_role(Role.OPERATOR))]


async def _admitted(request: Request, _caller: Client) -> AsyncIterator[AsyncExitStack]:
    """One place among the questions in flight, freed with all the stack holds when the response has ended."""
    state = state_of(request)
    async with AsyncExitStack() as stack:
        with _refusals_counted(state):
            state.pointer.require_fresh()
            stack.enter_context(state.admission.slot())
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
