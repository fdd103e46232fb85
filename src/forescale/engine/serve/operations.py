"""What the gateway answers over HTTP: one declaration for finding the route and for the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from forescale.core.signature import ITEM_BYTES

if TYPE_CHECKING:
    from pydantic import BaseModel

JSON = "application/json"
OCTETS = "application/octet-stream"
TEXT = "text/plain"

Schema = Mapping[str, Any]
"""A JSON schema (2020-12)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A method of a path.

    Attributes:
        path: with ``{names}`` for whole segments.
        does: in a line.
        takes: the body's shape by media type: a JSON schema, a type that pydantic can describe, or ``bytes``.
        gives: the same, of the answer.
        query: its parameters; None: it takes none.
        headers: JSON schemas of those that change what is done.
        status: of the answer.
        also: other statuses with an answer of that shape.
        refuses: statuses of the answers that are errors.
    """

    method: str
    path: str
    does: str
    takes: Mapping[str, object] = field(default_factory=dict[str, object])
    gives: Mapping[str, object] = field(default_factory=dict[str, object])
    query: type[BaseModel] | None = None
    headers: Mapping[str, Schema] = field(default_factory=dict[str, Schema])
    status: int = 200
    also: tuple[int, ...] = ()
    refuses: tuple[int, ...] = ()


def pattern_of(path: str) -> re.Pattern[str]:
    """Finds the names in a path."""
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))


def _component(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_SIZE: Schema = {"type": "integer", "minimum": 0}
_ROWS: Schema = {"type": "array", "items": {}}
_DATATYPE: Schema = {"type": "string", "enum": list(ITEM_BYTES)}
_LENGTHS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1}

SCHEMAS: Mapping[str, Schema] = {
    "Error": _object({"error": _TEXT}, "error"),
    "Server": _object(
        {"name": _TEXT, "version": _TEXT, "extensions": {"type": "array", "items": _TEXT}},
        "name",
        "version",
        "extensions",
    ),
    "Ready": _object({"name": _TEXT, "ready": _FLAG}, "name", "ready"),
    "TensorMetadata": _object(
        {
            "name": _TEXT,
            "datatype": _DATATYPE,
            "shape": {"type": "array", "items": {"type": "integer", "minimum": -1}},
        },
        "name",
        "datatype",
        "shape",
    ),
    "ModelMetadata": _object(
        {
            "name": _TEXT,
            "versions": {"type": "array", "items": _TEXT},
            "platform": _TEXT,
            "inputs": {"type": "array", "items": _component("TensorMetadata")},
            "outputs": {"type": "array", "items": _component("TensorMetadata")},
        },
        "name",
        "versions",
        "platform",
        "inputs",
        "outputs",
    ),
    "InferenceRequest": _object(
        {
            "id": {"type": ["string", "null"]},
            "parameters": _object(
                {
                    "priority": {"type": "integer", "minimum": 0, "maximum": 1000},
                    "timeout": {"type": "integer", "minimum": 0, "description": "microseconds"},
                    "binary_data_output": _FLAG,
                }
            ),
            "inputs": {"type": "array", "items": _component("InputTensor"), "minItems": 1},
            "outputs": {"type": "array", "items": _component("WantedOutput"), "minItems": 1},
        },
        "inputs",
    ),
    "InputTensor": _object(
        {
            "name": _TEXT,
            "datatype": _DATATYPE,
            "shape": _LENGTHS,
            "parameters": _object({"binary_data_size": _SIZE}),
            "data": _ROWS,
        },
        "name",
        "datatype",
        "shape",
    ),
    "WantedOutput": _object({"name": _TEXT, "parameters": _object({"binary_data": _FLAG})}, "name"),
    "InferenceResponse": _object(
        {
            "id": _TEXT,
            "model_name": _TEXT,
            "model_version": _TEXT,
            "outputs": {"type": "array", "items": _component("OutputTensor"), "minItems": 1},
        },
        "model_name",
        "model_version",
        "outputs",
    ),
    "OutputTensor": _object(
        {
            "name": _TEXT,
            "datatype": _DATATYPE,
            "shape": {"type": "array", "items": _SIZE},
            "parameters": _object({"binary_data_size": _SIZE}),
            "data": _ROWS,
        },
        "name",
        "datatype",
        "shape",
    ),
}
"""What those of the protocol speak, by name."""

_MODEL = "/v2/models/{model}"
_VERSION = _MODEL + "/versions/{version}"


def _get(
    path: str, does: str, gives: Schema, *, also: tuple[int, ...] = (), refuses: tuple[int, ...] = ()
) -> Operation:
    return Operation(method="GET", path=path, does=does, gives={JSON: gives}, also=also, refuses=refuses)


def _infer(path: str, does: str) -> Operation:
    return Operation(
        method="POST",
        path=path,
        does=does,
        takes={JSON: _component("InferenceRequest"), OCTETS: bytes},
        gives={JSON: _component("InferenceResponse"), OCTETS: bytes},
        headers={
            "Inference-Header-Content-Length": {
                "type": "integer",
                "minimum": 0,
                "description": "bytes of JSON at the beginning of the body, before tensors as bytes",
            },
            "X-Forescale-Client": {"type": "string", "description": "whose fair share of the model it uses"},
            "X-Forescale-Session": {
                "type": "string",
                "description": "requests of one are answered by the same version, as long as shares grow",
            },
        },
        refuses=(400, 404, 413, 415, 500, 503),
    )


LIVE = _get("/v2/health/live", "Whether the server runs.", _object({"live": _FLAG}, "live"))
READY = _get("/v2/health/ready", "Whether the server takes requests.", _object({"ready": _FLAG}, "ready"))
SERVER = _get("/v2", "Name, version and extensions of the server.", _component("Server"))
MODEL = _get(_MODEL, "What a model takes and gives.", _component("ModelMetadata"), refuses=(404,))
MODEL_READY = _get(
    f"{_MODEL}/ready", "Whether a model has replicas.", _component("Ready"), also=(503,), refuses=(404,)
)
VERSION = _get(_VERSION, "What a version takes and gives.", _component("ModelMetadata"), refuses=(404,))
VERSION_READY = _get(
    f"{_VERSION}/ready", "Whether a version has replicas.", _component("Ready"), also=(503,), refuses=(404,)
)
INFER = _infer(f"{_MODEL}/infer", "Asks a model's deployed version.")
VERSION_INFER = _infer(f"{_VERSION}/infer", "Asks a version of a model.")
METRICS = Operation(
    method="GET", path="/metrics", does="Counts and gauges for Prometheus.", gives={TEXT: {"type": "string"}}
)
