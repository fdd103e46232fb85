"""The OpenAPI 3.1 document of everything that a server answers, made of the declarations of its routes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from pydantic import TypeAdapter

from forescale import __version__
from forescale.api.http import Answer, Request, Route, route
from forescale.engine.serve.operations import JSON, SCHEMAS, Operation

_REF = "#/components/schemas/{model}"

Object = dict[str, Any]


def openapi(operations: Iterable[Operation]) -> Route:
    """The route of the document about these operations, and about itself."""

    async def answer(_request: Request) -> Answer:
        return Answer(body=body)

    itself = route("GET /openapi.json", "This document.", answer, gives=dict)
    body = document((*operations, itself))
    return itself


def document(operations: Iterable[Operation]) -> Object:
    """The document, as JSON; it says nothing about where the server is."""
    operations = tuple(operations)
    schemas, components = _schemas(operations)
    paths: dict[str, Object] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Forescale", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**SCHEMAS, **components},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas(operations: Iterable[Operation]) -> tuple[Mapping[object, Object], Object]:
    """Schemas of all types that the operations name, and the components that these refer to."""
    shapes = {
        shape
        for operation in operations
        for shape in (*operation.takes.values(), *operation.gives.values())
        if isinstance(shape, type) and shape is not bytes
    }
    adapters = [(shape, "validation", TypeAdapter(shape)) for shape in shapes]
    schemas, definitions = TypeAdapter.json_schemas(adapters, ref_template=_REF)  # pyright: ignore[reportArgumentType]
    return {shape: schema for (shape, _), schema in schemas.items()}, definitions.get("$defs", {})


def _operation(operation: Operation, schemas: Mapping[object, Object]) -> Object:
    answers: Object = {
        str(status): {"description": HTTPStatus(status).phrase, "content": _content(operation.gives, schemas)}
        for status in (operation.status, *operation.also)
    }
    for status in operation.refuses:
        answers[str(status)] = _refusal(status)
    if is_managing := operation.path.startswith("/api/"):
        answers["401"] = _refusal(401)
    described: Object = {"summary": operation.does, "responses": answers}
    if is_managing:
        described["security"] = [{}, {"token": []}]  # needed only if the server was given tokens
    if parameters := [*_parameters(operation)]:
        described["parameters"] = parameters
    if operation.takes:
        described["requestBody"] = {"required": True, "content": _content(operation.takes, schemas)}
    return described


def _refusal(status: int) -> Object:
    content = {JSON: {"schema": {"$ref": _REF.format(model="Error")}}}
    return {"description": HTTPStatus(status).phrase, "content": content}


def _parameters(operation: Operation) -> Iterable[Object]:
    for name in re.findall(r"\{(\w+)\}", operation.path):
        yield {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1},
        }
    for name, schema in operation.headers.items():
        yield {"name": name, "in": "header", "required": False, "schema": schema}
    if operation.query is not None:
        query = operation.query.model_json_schema()
        for name, schema in query["properties"].items():
            yield {
                "name": name,
                "in": "query",
                "required": name in query.get("required", ()),
                "schema": schema,
            }


def _content(shapes: Mapping[str, object], schemas: Mapping[object, Object]) -> Object:
    return {media: {"schema": _schema(shape, schemas)} for media, shape in shapes.items()}


def _schema(shape: object, schemas: Mapping[object, Object]) -> object:
    if isinstance(shape, Mapping):
        return shape
    return {} if shape is bytes else schemas[shape]
