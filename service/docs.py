"""What OpenAPI says beyond the routes' own types: problems, upload bodies, event streams and examples."""

from collections import defaultdict
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from hscr import errors as e
from hscr.errors import HscrError
from service import schemas
from service.errors import PROBLEM_JSON, HttpRefusal, InternalError, Problem, problem, status_of
from service.examples import EXAMPLES
from service.pointer import PointerStale

_REF = "#/components/schemas/{model}"
_UPLOADS = (schemas.VqaBody, schemas.CaptionBody)
_BODIES = (*_UPLOADS, schemas.ChatBody, schemas.PreferenceJobBody)

ALWAYS = (
    e.InvalidInput, e.Unauthenticated, e.Forbidden, e.StoreError, e.StoreFull, e.StoreReadOnly, InternalError,
)  # fmt: skip
"""What any route behind a key may answer with."""

SENDING = (*ALWAYS, e.ImageTooLarge)
"""What any route that reads a body may answer with: the bound on bodies holds everywhere."""

ASKING = (
    *SENDING,
    HttpRefusal,
    e.InvalidImage,
    e.UnsupportedImage,
    e.InvalidQuestion,
    e.NotFound,
    e.Conflict,
    e.IdempotencyConflict,
    e.Gone,
    e.Overloaded,
    PointerStale,
    e.EngineUnavailable,
    e.EngineError,
    e.EngineInterrupted,
)
"""What a question may answer with."""


def problems(*kinds: type[HscrError]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these errors, grouped by status, each with its example."""
    by_status: dict[int, list[type[HscrError]]] = defaultdict(list)
    for kind in dict.fromkeys(kinds):
        by_status[status_of(kind)].append(kind)
    return {
        status: {
            "description": "; ".join(kind.title for kind in group),
            "content": {
                PROBLEM_JSON: {
                    "schema": {"$ref": _REF.format(model=Problem.__name__)},
                    "examples": {kind.slug: {"value": _example(kind)} for kind in group},
                }
            },
        }
        for status, group in by_status.items()
    }


def _example(kind: type[HscrError]) -> dict[str, Any]:
    return problem(
        kind("What is wrong with this request.", remedy="What to do about it."), "/v1/..."
    ).model_dump()


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """For a route that reads its JSON body itself."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def upload_body(model: type[BaseModel]) -> dict[str, Any]:
    """JSON with a base64 image, or the same fields as a form with an image file."""
    body = json_body(model)
    body["requestBody"]["content"]["multipart/form-data"] = {
        "schema": {"$ref": _REF.format(model=_form(model))}
    }
    return body


def answer_or_events() -> dict[int | str, dict[str, Any]]:
    story = 'event: delta\ndata: {"text":"Yes"}\n\nevent: answer\ndata: {"id":"ans_...","text":"Yes"}\n\n'
    return _events("The kept answer, or its events when `stream` is true", story)


def chat_or_events() -> dict[int | str, dict[str, Any]]:
    story = (
        'data: {"object":"chat.completion.chunk","choices":[{"delta":{"content":"Yes"}}]}\n\ndata: [DONE]\n\n'
    )
    return _events("The completion, or its chunks when `stream` is true", story)


def _events(description: str, story: str) -> dict[int | str, dict[str, Any]]:
    content = {"text/event-stream": {"schema": {"type": "string"}, "example": story}}
    return {200: {"description": description, "content": content}}


def describe(app: FastAPI) -> None:
    """Make `app.openapi()` complete; the document is built once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
                separate_input_output_schemas=False,
            )
            _complete(document["components"]["schemas"])
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(components: dict[str, Any]) -> None:
    models: list[tuple[type[BaseModel], Any]] = [(model, "validation") for model in (*_BODIES, Problem)]
    _, definitions = models_json_schema(models, ref_template=_REF)
    for name, schema in definitions["$defs"].items():
        components.setdefault(name, schema)
    for model in _UPLOADS:
        components[_form(model)] = _as_form(components[model.__name__])
    for kind, example in EXAMPLES.items():
        components[kind.__name__]["examples"] = [example.model_dump(mode="json")]
    for unused in ("HTTPValidationError", "ValidationError"):
        components.pop(unused, None)


def _form(model: type[BaseModel]) -> str:
    return model.__name__.replace("Body", "Form")


def _as_form(schema: dict[str, Any]) -> dict[str, Any]:
    properties = dict(schema["properties"])
    properties["image"] = {"type": "string", "format": "binary", "description": "PNG, JPEG or DICOM file"}
    properties["sampling"] = {"type": "string", "description": "JSON of the Sampling schema"}
    return {**schema, "title": "The same as a form", "properties": properties}
