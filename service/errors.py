"""Every error as RFC 9457 problem+json, with OpenAI's `error` member beside it; one table of statuses."""

from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from hscr import errors as e
from hscr.errors import HscrError
from service.logs import log, request_id

PROBLEM_JSON = "application/problem+json"


class InternalError(HscrError):
    slug = "internal-error"
    title = "The gateway failed"


class HttpRefusal(HscrError):
    """What the HTTP layer itself refuses: a method, or a media type."""

    slug = "http-refusal"
    title = "The request is not one this path takes"


STATUS: dict[type[HscrError], int] = {
    e.InvalidInput: 422,
    e.UnsupportedImage: 415,
    e.ImageTooLarge: 413,
    e.Unauthenticated: 401,
    e.Forbidden: 403,
    e.ConsentMissing: 403,
    e.NotFound: 404,
    e.Gone: 410,
    e.Conflict: 409,
    e.GateRefused: 409,
    e.AdapterRefused: 422,
    e.Overloaded: 429,
    e.EngineError: 502,
    e.EngineUnavailable: 503,
    e.StoreError: 503,
    e.JobCancelled: 409,
    HttpRefusal: 415,
    HscrError: 500,
}
"""A class that is not listed has the status of its nearest listed parent."""

RETRY_AFTER = {429: "1", 503: "2"}
"""Seconds a client should wait, by status, where the error itself knows no better."""


class OpenAIError(BaseModel):
    """What OpenAI's client libraries look for."""

    message: str
    type: str
    code: str
    param: str | None = None


class Problem(BaseModel):
    """RFC 9457. `type` is stable and `GET` on it explains it."""

    type: str = Field(examples=["/problems/invalid-image"])
    title: str
    status: int
    detail: str = Field(description="what is wrong with this request; never patient data")
    remedy: str = Field(description="what to do about it")
    instance: str = Field(description="the path that was asked for")
    request_id: str
    error: OpenAIError


def status_of(kind: type[HscrError]) -> int:
    return next(STATUS[parent] for parent in kind.__mro__ if parent in STATUS)


def problem(
    error: HscrError, instance: str, *, status: int | None = None, param: str | None = None
) -> Problem:
    code = status or status_of(type(error))
    message = f"{error.detail} {error.remedy}".strip()
    kind = "invalid_request_error" if code < 500 else "server_error"
    return Problem(
        type=f"/problems/{error.slug}",
        title=error.title,
        status=code,
        detail=error.detail,
        remedy=error.remedy,
        instance=instance,
        request_id=request_id(),
        error=OpenAIError(message=message, type=kind, code=error.slug, param=param),
    )


def problem_response(found: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    extra = dict(headers or {})
    if found.status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if found.status in RETRY_AFTER:
        extra.setdefault("Retry-After", RETRY_AFTER[found.status])
    return JSONResponse(found.model_dump(), status_code=found.status, headers=extra, media_type=PROBLEM_JSON)


def invalid_field(failures: Sequence[Any]) -> tuple[e.InvalidInput, str]:
    """The first failure of a validation, named by its field; the value itself is not repeated."""
    first = failures[0]
    places = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    field = ".".join(places) or "request body"
    error = e.InvalidInput(
        f"`{field}`: {first['msg']}.", remedy="Correct this field; /openapi.json describes every body."
    )
    return error, field


def install(app: FastAPI) -> None:
    """Translate what routes raise. Exceptions nobody meant are caught in service.middleware."""
    app.add_exception_handler(HscrError, _on_hscr_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_hscr_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HscrError)
    found = problem(error, request.url.path)
    if found.status >= 500:
        log().warning("failed", slug=error.slug, error=type(error).__name__)
    wait = {"Retry-After": str(error.retry_after)} if isinstance(error, e.Overloaded) else None
    return problem_response(found, wait)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    invalid, field = invalid_field(error.errors())
    return problem_response(problem(invalid, request.url.path, param=field))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = 422 if error.status_code == 400 else error.status_code
    found = problem(_refusal(error), request.url.path, status=status)
    return problem_response(found, error.headers)


def _refusal(error: HTTPException) -> HscrError:
    if error.status_code == 404:
        return e.NotFound("There is nothing at this path.", remedy="/openapi.json lists every path.")
    if error.status_code == 413:
        return e.ImageTooLarge(str(error.detail), remedy="Send a smaller image, or fewer rows per request.")
    if error.status_code == 400:  # the form or the text encoding cannot be read at all
        return e.InvalidInput("The request body cannot be read.", remedy="Send well-formed JSON or a form.")
    phrase = HTTPStatus(error.status_code).phrase
    return HttpRefusal(f"{phrase}.", remedy="/openapi.json describes what each path takes.")


def known_problems() -> dict[str, type[HscrError]]:
    """Every class of error by its slug."""
    return {kind.slug: kind for kind in _tree(HscrError)}


def _tree(kind: type[HscrError]) -> Iterator[type[HscrError]]:
    for child in kind.__subclasses__():
        yield from _tree(child)
    yield kind
