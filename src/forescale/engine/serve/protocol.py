"""The Open Inference Protocol v2 over REST, with its binary tensor extension; bodies only, no sockets.

https://github.com/kserve/open-inference-protocol and Triton's documents of the extensions for binary
tensors, for ``priority`` (1 goes first) and for ``timeout`` (microseconds).

A tensor sent as bytes is not copied: its array looks into the body. JSON has no NaN and no infinity, so they
are refused as inputs; as outputs they become ``null`` there. As bytes both pass.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import orjson

from forescale.core.errors import BadRequest
from forescale.core.signature import Signature, TensorSpec, signature_as_json
from forescale.engine.serve.arrays import DTYPES, Array, datatype_of
from forescale.engine.serve.journey import Journey
from forescale.engine.serve.requests import InferRequest, WantedOutput

JSON_LENGTH_HEADER = b"inference-header-content-length"

# ``struct`` is quicker than NumPy with lists, and refuses values of another type.
_STRUCT_CODES: Mapping[str, str] = {
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
_NEEDS_MEMORY = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")
_JsonObject = dict[str, Any]


def parse_request(
    body: bytes, json_length_bytes: int | None, signature: Signature, journey: Journey | None = None
) -> InferRequest:
    """Read the body of an inference request.

    Args:
        body: JSON, and behind it the tensors sent as bytes. The request's arrays may look into it.
        json_length_bytes: how much of it is JSON; None: all.
        journey: becomes the request's.

    Raises:
        BadRequest: it makes no sense or does not fit the signature.
    """
    tail = memoryview(b"")
    text: bytes | memoryview = body
    if json_length_bytes is not None:
        if not 0 <= json_length_bytes <= len(body):
            raise BadRequest(f"the JSON part is said to be {json_length_bytes:,} bytes, not {len(body):,}")
        text, tail = memoryview(body)[:json_length_bytes], memoryview(body)[json_length_bytes:]
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRequest("the body must be a JSON object")
    given = _by_name(fields.get("inputs"), "inputs")
    raw = _raw_tensors(given, tail)
    inputs = tuple(_input(spec, given, raw) for spec in signature.inputs)
    if len(given) > len(inputs):
        known = {spec.name for spec in signature.inputs}
        raise BadRequest(f"the model has no input {next(name for name in given if name not in known)!r}")
    rows = _rows(inputs, signature)
    parameters = _parameters(fields)
    return InferRequest(
        id=_id(fields),
        inputs=inputs,
        rows=rows,
        size_bytes=sum(values.nbytes for values in inputs),
        free_lengths=_free_lengths(inputs, signature),
        outputs=_wanted_outputs(fields, parameters, signature),
        priority=_priority(parameters),
        timeout_s=_timeout_s(parameters),
        journey=journey,
    )


def format_answer(
    request: InferRequest, outputs: Mapping[str, Array], *, model: str, version: str
) -> tuple[list[bytes | memoryview], int | None]:
    """The body of an answer.

    Returns:
        Parts of the body in order, and the length in bytes of its JSON if tensors follow as bytes.
    """
    entries: list[_JsonObject] = []
    tail: list[bytes | memoryview] = []
    for wanted in request.outputs:
        values = np.require(outputs[wanted.name], requirements=("C_CONTIGUOUS", "ALIGNED"))
        entry: _JsonObject = {
            "name": wanted.name,
            "datatype": datatype_of(values),
            "shape": values.shape,
        }
        if wanted.binary:
            entry["parameters"] = {"binary_data_size": values.nbytes}
            tail.append(values.reshape(-1).view(np.uint8).data)
        else:
            entry["data"] = values.reshape(-1)
        entries.append(entry)
    fields: _JsonObject = {"model_name": model, "model_version": version, "outputs": entries}
    if request.id is not None:
        fields["id"] = request.id
    head = orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)
    return [head, *tail], len(head) if tail else None


def format_error(message: str) -> bytes:
    return orjson.dumps({"error": message})


def format_metadata(model: str, versions: Sequence[str], signature: Signature) -> bytes:
    """What a model takes and gives; -1 stands for any length."""
    return orjson.dumps(
        {"name": model, "versions": list(versions), "platform": "forescale", **signature_as_json(signature)}
    )


def _by_name(entries: object, what: str) -> dict[str, _JsonObject]:
    if not isinstance(entries, list) or not entries:
        raise BadRequest(f"{what!r} must be a list with something in it")
    named: dict[str, _JsonObject] = {}
    for entry in cast(list[object], entries):
        if not isinstance(entry, dict) or not isinstance(name := entry.get("name"), str):
            raise BadRequest(f"each of {what!r} must be an object with a name")
        if name in named:
            raise BadRequest(f"{name!r} comes twice in {what!r}")
        named[name] = cast(_JsonObject, entry)
    return named


def _parameters(fields: _JsonObject) -> _JsonObject:
    parameters = fields.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise BadRequest("'parameters' must be an object")
    if any(name in parameters for name in _NEEDS_MEMORY):
        raise BadRequest("shared memory is not supported; send the tensors in the body")
    return cast(_JsonObject, parameters)


def _raw_tensors(given: dict[str, _JsonObject], tail: memoryview) -> dict[str, memoryview]:
    """The tensors sent as bytes, by name: they stand behind the JSON in the order of the inputs."""
    raw: dict[str, memoryview] = {}
    taken_bytes = 0
    for name, entry in given.items():
        size_bytes = _parameters(entry).get("binary_data_size")
        if size_bytes is None:
            continue
        if type(size_bytes) is not int or not 0 <= size_bytes <= len(tail) - taken_bytes:
            raise BadRequest(
                f"{name}: 'binary_data_size' is {size_bytes!r}, {len(tail) - taken_bytes:,} bytes are there"
            )
        raw[name] = tail[taken_bytes : taken_bytes + size_bytes]
        taken_bytes += size_bytes
    if taken_bytes < len(tail):
        raise BadRequest(f"{len(tail) - taken_bytes:,} bytes of the body belong to no input")
    return raw


def _input(spec: TensorSpec, given: dict[str, _JsonObject], raw: dict[str, memoryview]) -> Array:
    name = spec.name
    entry = given.get(name)
    if entry is None:
        raise BadRequest(f"input {name!r} is missing")
    if entry.get("datatype") != spec.datatype:
        raise BadRequest(f"{name}: the model takes {spec.datatype}, not {entry.get('datatype')!r}")
    shape = _shape(spec, entry.get("shape"))
    data = entry.get("data")
    if (frame := raw.get(name)) is not None:
        if data is not None:
            raise BadRequest(f"{name}: it has 'data' and 'binary_data_size'; give one of them")
        return _from_bytes(spec, shape, frame)
    if not isinstance(data, list):
        raise BadRequest(f"{name}: 'data' must be a list")
    return _from_json(spec, shape, cast(list[Any], data))


def _shape(spec: TensorSpec, shape: object) -> tuple[int, ...]:
    if not isinstance(shape, list):
        raise BadRequest(f"{spec.name}: 'shape' must be a list of lengths from 1 on")
    lengths = cast(list[Any], shape)
    fits = len(lengths) == len(spec.shape)
    for length, wanted in zip(lengths, spec.shape, strict=False):  # a loop: generators take thrice as long
        if type(length) is not int or length <= 0:
            raise BadRequest(f"{spec.name}: 'shape' must be a list of lengths from 1 on")
        fits = fits and wanted in (None, length)
    if not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in spec.shape)
        raise BadRequest(f"{spec.name}: the model takes shape [{wanted}], not {lengths}")
    return tuple(lengths)


def _from_bytes(spec: TensorSpec, shape: tuple[int, ...], frame: memoryview) -> Array:
    dtype = DTYPES[spec.datatype]
    if len(frame) != math.prod(shape) * dtype.itemsize:
        raise BadRequest(
            f"{spec.name}: {spec.datatype} of shape {list(shape)} is "
            f"{math.prod(shape) * dtype.itemsize:,} bytes, not {len(frame):,}"
        )
    if spec.datatype == "BOOL" and np.frombuffer(frame, np.uint8).max() > 1:
        raise BadRequest(f"{spec.name}: a byte of BOOL is 0 or 1")
    return np.frombuffer(frame, dtype).reshape(shape)


def _from_json(spec: TensorSpec, shape: tuple[int, ...], data: list[Any]) -> Array:
    name = spec.name
    rows = _innermost(data, shape, name)
    if len(rows) * len(rows[0]) != math.prod(shape):
        raise BadRequest(f"{name}: {len(data):,} values for shape {list(shape)}")
    if spec.datatype == "BOOL":
        if any(set(map(type, row)) != {bool} for row in rows):
            raise BadRequest(f"{name}: BOOL takes true and false")
        return np.array(list(itertools.chain.from_iterable(rows)), np.bool_).reshape(shape)
    try:
        code = _STRUCT_CODES[spec.datatype]
        packed = [struct.pack(f"{len(row)}{code}", *row) for row in rows]
    except (struct.error, OverflowError) as error:
        raise BadRequest(f"{name}: a value is no {spec.datatype}: {error}") from error
    flat = np.frombuffer(packed[0] if len(packed) == 1 else b"".join(packed), DTYPES[spec.datatype])
    # ``struct`` refuses too large values of other types. Counting takes half of what ``all`` does.
    if code == "f" and np.count_nonzero(np.isfinite(flat)) < flat.size:
        raise BadRequest(f"{name}: a value is beyond the range of {spec.datatype}")
    return flat.reshape(shape)


def _innermost(data: list[Any], shape: tuple[int, ...], name: str) -> list[list[Any]]:
    """The lists that hold the values, of data that is flat or nested as the shape says."""
    if not data or type(data[0]) is not list:
        return [data]
    level: list[Any] = [data]
    for length in shape[:-1]:
        level = list(itertools.chain.from_iterable(level)) if _all_long(level, length) else []
    if not _all_long(level, shape[-1]):
        raise BadRequest(f"{name}: 'data' is neither flat nor nested as its shape {list(shape)}")
    return level


def _all_long(level: list[Any], length: int) -> bool:
    return set(map(type, level)) == {list} and set(map(len, level)) == {length}


def _rows(inputs: tuple[Array, ...], signature: Signature) -> int:
    rows = len(inputs[0])
    if any(len(values) != rows for values in inputs):
        counts = ", ".join(
            f"{spec.name} {len(values)}" for spec, values in zip(signature.inputs, inputs, strict=True)
        )
        raise BadRequest(f"all inputs need as many rows, not {counts}")
    return rows


def _free_lengths(inputs: tuple[Array, ...], signature: Signature) -> tuple[int, ...]:
    return tuple([inputs[number].shape[axis] for number, axis in _free_axes(signature)])


@lru_cache
def _free_axes(signature: Signature) -> tuple[tuple[int, int], ...]:
    """Number of the input and of its axis, of all whose length the signature leaves open, but the rows."""
    return tuple(
        (number, axis)
        for number, spec in enumerate(signature.inputs)
        for axis, length in enumerate(spec.shape)
        if axis and length is None
    )


def _wanted_outputs(
    fields: _JsonObject, parameters: _JsonObject, signature: Signature
) -> tuple[WantedOutput, ...]:
    binary = _flag(parameters, "binary_data_output", False)
    if fields.get("outputs") is None:
        return _all_outputs(signature, binary)
    known = [spec.name for spec in signature.outputs]
    wanted: list[WantedOutput] = []
    for name, entry in _by_name(fields["outputs"], "outputs").items():
        if name not in known:
            raise BadRequest(f"the model has no output {name!r}, but {', '.join(known)}")
        own = _parameters(entry)
        if "classification" in own:
            raise BadRequest(f"{name}: classification is not supported")
        wanted.append(WantedOutput(name=name, binary=_flag(own, "binary_data", binary)))
    return tuple(wanted)


@lru_cache
def _all_outputs(signature: Signature, binary: bool) -> tuple[WantedOutput, ...]:
    return tuple(WantedOutput(name=spec.name, binary=binary) for spec in signature.outputs)


def _flag(parameters: _JsonObject, name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadRequest(f"{name!r} must be true or false")
    return value


def _id(fields: _JsonObject) -> str | None:
    name = fields.get("id")
    if name is not None and not isinstance(name, str):
        raise BadRequest("'id' must be a string")
    return name


def _priority(parameters: _JsonObject) -> int:
    if parameters.get("sequence_id"):
        raise BadRequest("sequences are not supported; each request stands alone")
    priority = parameters.get("priority", 0)
    if type(priority) is not int or not 0 <= priority <= 1000:
        raise BadRequest("'priority' must be a number from 1 (goes first) to 1000")
    return priority


def _timeout_s(parameters: _JsonObject) -> float | None:
    timeout_us = parameters.get("timeout", 0)
    if type(timeout_us) is not int or timeout_us < 0:
        raise BadRequest("'timeout' must be a number of microseconds")
    return timeout_us / 1e6 if timeout_us else None
