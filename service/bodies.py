"""Reading the bodies that carry images: parsed beside the event loop, after the caller was admitted."""

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile

from hscr.errors import InvalidImage, InvalidInput
from service.deps import Admitted, state_of
from service.limits import image_bytes
from service.schemas import ImageBody
from service.state import State

B = TypeVar("B", bound=BaseModel)
U = TypeVar("U", bound=ImageBody)

_PLACEHOLDER = "-"  # the image of a form is a file and travels beside the model
_AT_ONCE = 16_384
"""bytes of a body that are parsed sooner than another thread would have begun"""


@dataclass(frozen=True)
class Upload(Generic[U]):
    """A question's body, and the bytes of its image."""

    body: U
    data: bytes

    @property
    def digest(self) -> str:
        """Of what was asked, however it was encoded: the request's identity for its Idempotency-Key."""
        return request_digest(self.body, hashlib.sha256(self.data).hexdigest(), without={"image", "stream"})


def request_digest(body: BaseModel, *more: str, without: set[str] | None = None) -> str:
    """SHA-256 over the kind of request and its values, hex."""
    values = body.model_dump(mode="json", exclude=without)
    return hashlib.sha256(
        json.dumps([type(body).__name__, values, *more], sort_keys=True).encode()
    ).hexdigest()


def json_of(model: type[B]) -> Callable[..., Awaitable[B]]:
    """A dependency that reads a JSON body."""

    async def read(request: Request, _: Admitted) -> B:
        return await _parsed(state_of(request), model, request)

    return read


def upload_of(model: type[U]) -> Callable[..., Awaitable[Upload[U]]]:
    """A dependency that reads a JSON body with a base64 image, or a form with an image file."""

    async def read(request: Request, _: Admitted) -> Upload[U]:
        state = state_of(request)
        if _media_type(request) != "multipart/form-data":
            body = await _parsed(state, model, request)
            return Upload(body, await state.images(image_bytes, body.image))
        async with request.form(max_files=1, max_fields=20, max_part_size=100_000) as form:
            body = _validated(model.model_validate, _fields(form))
            return Upload(body, await _file(form))

    return read


async def _parsed(state: State, model: type[B], request: Request) -> B:
    if _media_type(request) != "application/json":
        raise HTTPException(415)
    body = await request.body()
    if len(body) <= _AT_ONCE:
        return _validated(model.model_validate_json, body)
    return await state.images(_validated, model.model_validate_json, body)


def _validated(parse: Callable[[Any], B], value: Any) -> B:
    try:
        return parse(value)
    except ValidationError as error:
        failures = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError(failures) from None  # the cause would carry the input


def _fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {name: value for name, value in form.items() if isinstance(value, str)}
    if "image" in fields:
        raise InvalidInput(
            "`image` of a form must be a file.", remedy="Send it with a file name, or use JSON."
        )
    if "sampling" in fields:
        fields["sampling"] = _json(fields["sampling"])
    return {**fields, "image": _PLACEHOLDER}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidInput("`sampling` is not valid JSON.", remedy='Send {"temperature": 0}.') from error


async def _file(form: FormData) -> bytes:
    file = form.get("image")
    data = await file.read() if isinstance(file, UploadFile) else b""
    if not data:
        raise InvalidImage("The form has no `image` file, or it is empty.", remedy="Attach one image file.")
    return data


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
