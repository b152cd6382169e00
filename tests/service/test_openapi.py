"""The document describes every body, status and example, and is true (see `check_documented`)."""

import json

import pytest
from pydantic import TypeAdapter

from hscr.errors import HscrError
from service import schemas
from service.app import create_app
from service.errors import known_problems, status_of
from service.examples import EXAMPLES
from service.settings import GatewaySettings


@pytest.fixture(scope="module")
def document():
    return create_app(GatewaySettings()).openapi()


def operations(document):
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def test_every_operation_is_named_tagged_and_says_what_it_is_for(document):
    found = operations(document)
    assert len({operation["operationId"] for _, operation in found}) == len(found)
    for name, operation in found:
        assert operation["tags"], name
        assert (
            "research use only" in operation["description"].lower() + document["info"]["description"].lower()
        )
        assert operation["responses"], name
    assert "research use only" in document["info"]["description"].lower()


def test_every_route_documents_its_problems_with_examples(document):
    for name, operation in operations(document):
        problems = {status: r for status, r in operation["responses"].items() if int(status) >= 400}
        assert "500" in problems, name
        if name.split()[1].startswith("/v1/"):
            assert {"401", "403", "422", "503"} <= set(problems), name
        for status, response in problems.items():
            media = response["content"]["application/problem+json"]
            assert list(response["content"]) == ["application/problem+json"]
            assert media["schema"] == {"$ref": "#/components/schemas/Problem"}
            for slug, example in media["examples"].items():
                assert example["value"]["status"] == int(status)
                assert example["value"]["type"] == f"/problems/{slug}"


def test_every_body_has_a_schema_and_a_valid_example(document):
    components = document["components"]["schemas"]
    for name, operation in operations(document):
        bodies = [operation.get("requestBody", {"content": {}})["content"]]
        bodies += [each["content"] for status, each in operation["responses"].items() if int(status) < 300]
        for content in bodies:
            for media_type, media in content.items():
                if media_type == "application/json":
                    schema = components[media["schema"]["$ref"].rpartition("/")[2]]
                    assert schema["examples"], name


@pytest.mark.parametrize("model", EXAMPLES, ids=lambda model: model.__name__)
def test_examples_validate(model, document):
    for example in document["components"]["schemas"][model.__name__]["examples"]:
        TypeAdapter(model).validate_json(json.dumps(example))


def test_no_reference_dangles(document):
    text = json.dumps(document)
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in text


def test_every_error_has_one_status():
    kinds = known_problems()
    assert set(kinds) >= {
        "invalid-image",
        "gate-refused",
        "engine-interrupted",
        "pointer-stale",
        "overloaded",
    }
    assert all(400 <= status_of(kind) < 600 for kind in kinds.values())
    assert status_of(HscrError) == 500


def test_nothing_comes_from_elsewhere(document):
    assert "cdn" not in json.dumps(document).lower()
    assert schemas.NOTICE in document["info"]["description"]
