"""Graphs as JSON text, and back.

The text is the dataclasses of :mod:`forescale.graph.model`, field by field, beside ``"format": 1``.
Reading is strict: every key must be known and present, every value of its field's type, every name
and index must lead somewhere. What it returns can be planned without further checks.
"""

from __future__ import annotations

import dataclasses
import json
import keyword
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from forescale.core.errors import InvalidInput
from forescale.graph.model import ModelGraph, Operator, Tensor
from forescale.graph.size import ELEMENT_BYTES, compile_numbers, compile_sizes

FORMAT = 1
_REFERENCES = (
    "tensor",
    "parameter",
    "buffer",
    "size",
    "number",
    "dtype",
    "device",
    "layout",
    "memory_format",
)
# These become code (forescale.graph.program), so only these are let in.
_WORDS: Mapping[str, frozenset[str]] = {
    "dtype": frozenset(ELEMENT_BYTES),
    "layout": frozenset(
        {"strided", "jagged", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"}
    ),
    "memory_format": frozenset({"contiguous_format", "preserve_format", "channels_last", "channels_last_3d"}),
}
_TARGET = re.compile(r"module:[\w.]*|[a-z]\w*\.\w+\.[A-Za-z]\w*", re.ASCII)
_MAX_DEPTH = 32
_T = TypeVar("_T")


def to_json(graph: ModelGraph) -> str:
    """The graph as text that :func:`from_json` turns into an equal graph."""
    return json.dumps({"format": FORMAT, **_encode(graph)}, allow_nan=False, separators=(",", ":"))


def from_json(text: str | bytes) -> ModelGraph:
    """The graph that :func:`to_json` wrote.

    Raises:
        InvalidInput: not such text; the message names the place.
    """
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the graph is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInput("the graph's JSON is not an object")
    if type(version := document.pop("format", None)) is not int or version != FORMAT:
        raise InvalidInput(f"the graph has format {version!r}; this version reads format {FORMAT}")
    graph = _decode(document, ModelGraph, "graph")
    _check_tensors(graph)
    for position, operator in enumerate(graph.operators):
        _check_operator(graph, operator, position)
    _check_sizes(graph)
    return graph


def _refuse_constant(name: str) -> typing.NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _encode(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}  # JSON has no infinities
    return value


def _decode(value: Any, kind: Any, place: str) -> Any:
    """``value`` as an instance of the annotation ``kind``."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _decode_argument(value, place, 0)
    if dataclasses.is_dataclass(kind):
        return _decode_fields(value, typing.cast("type[Any]", kind), place)
    if origin is tuple:
        items = _checked(value, list, place)
        return tuple(_decode(item, parts[0], f"{place}[{k}]") for k, item in enumerate(items))
    if origin is Mapping:
        return {k: _decode(v, parts[1], f"{place}[{k!r}]") for k, v in _checked(value, dict, place).items()}
    kinds = parts if origin is types.UnionType else (kind,)
    if type(value) not in kinds:
        raise InvalidInput(f"{place} is {str(value)[:40]!r}, expected {_named(kinds)}")
    return value


def _decode_fields(value: Any, kind: type[Any], place: str) -> Any:
    given = _checked(value, dict, place)
    hints = _hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    if wrong := [*(k for k in given if k not in known), *(k for k in known if k not in given)]:
        what = "has the unknown key" if wrong[0] in given else "lacks the key"
        raise InvalidInput(f"{place} {what} {wrong[0]!r}")
    return kind(**{name: _decode(given[name], hints[name], f"{place}.{name}") for name in known})


@lru_cache
def _hints(kind: type[Any]) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


def _decode_argument(value: Any, place: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise InvalidInput(f"{place} is nested too deeply")
    if isinstance(value, list):
        return [_decode_argument(item, place, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or (kind := next(iter(value))) not in (*_REFERENCES, "float"):
        raise InvalidInput(
            f"{place} is {str(value)[:80]!r}, expected one of the keys {', '.join(_REFERENCES)}"
        )
    what = value[kind]
    if kind == "float":
        if what not in ("inf", "-inf", "nan"):
            raise InvalidInput(f"{place} has the float {str(what)[:40]!r}")
        return float(what)
    if type(what) is not (types.NoneType if kind == "device" else str) or what not in _WORDS.get(
        kind, (what,)
    ):
        raise InvalidInput(f"{place} has the {kind} {str(what)[:40]!r}")
    return {kind: what}


def _checked(value: Any, kind: type[_T], place: str) -> _T:
    if type(value) is not kind:
        raise InvalidInput(f"{place} is {str(value)[:40]!r}, expected {_named((kind,))}")
    return value


def _named(kinds: tuple[Any, ...]) -> str:
    names = {list: "a list", dict: "an object", str: "a text", int: "a whole number", bool: "true or false"}
    return " or ".join(names.get(kind, "null") for kind in kinds)


def _check_tensors(graph: ModelGraph) -> None:
    for name, tensor in graph.tensors.items():
        _check_tensor(graph, name, tensor)
    tables = {"parameter": graph.parameters, "buffer": graph.buffers}
    for kind, table in tables.items():
        for name, entry in table.items():
            _require(entry.name == name, f"{kind} {name!r} calls itself {entry.name!r}")
    for name in (*graph.inputs, *graph.outputs, *(u.tensor for u in graph.buffer_updates)):
        _require(name in graph.tensors, f"there is no tensor {name!r}")
    for update in graph.buffer_updates:
        _require(update.buffer in graph.buffers, f"there is no buffer {update.buffer!r}")
    for symbol, source in graph.symbols.items():
        _require(
            source.tensor in graph.inputs,
            f"symbol {symbol!r} is read from {source.tensor!r}, which is no input",
        )
        rank = len(graph.tensors[source.tensor].shape)
        _require(0 <= source.axis < rank, f"symbol {symbol!r} is read from axis {source.axis} of {rank}")
    events = all(0 <= event.operator <= len(graph.operators) for event in graph.memory)
    _require(events, "its memory has an event of an operator that does not exist")
    for saved in graph.saved:
        _require(
            all(_is_operator(graph, o) for o in saved.operators), f"saved {saved.name!r} has a wrong operator"
        )


def _check_tensor(graph: ModelGraph, name: str, tensor: Tensor) -> None:
    _require(tensor.name == name, f"tensor {name!r} calls itself {tensor.name!r}")
    readers = (_is_operator(graph, c) and name in graph.operators[c].inputs for c in tensor.consumers)
    _require(all(readers), f"tensor {name!r} has wrong consumers")
    if tensor.producer is None:
        _require(name in graph.inputs, f"tensor {name!r} has no producer and is no input")
    else:
        made = _is_operator(graph, tensor.producer) and name in graph.operators[tensor.producer].outputs
        _require(made, f"tensor {name!r} has a wrong producer")


def _is_operator(graph: ModelGraph, index: int) -> bool:
    return 0 <= index < len(graph.operators)


def _check_operator(graph: ModelGraph, operator: Operator, position: int) -> None:
    place = f"operator {operator.name!r}"
    _require(operator.index == position, f"{place} has index {operator.index} at position {position}")
    _require(bool(_TARGET.fullmatch(operator.target)), f"{place} has the target {operator.target[:80]!r}")
    names = all(k.isidentifier() and not keyword.iskeyword(k) for k in operator.kwargs)
    _require(names, f"{place} has an argument whose name is no name")
    read = {"tensor": set[str](), "parameter": set[str](), "buffer": set[str]()}
    for kind, what in _references((*operator.args, *operator.kwargs.values())):
        read.setdefault(kind, set()).add(what)
    declared = (set(operator.inputs), set(operator.parameters), set(operator.buffers))
    _require(
        (read["tensor"], read["parameter"], read["buffer"]) == declared,
        f"{place} does not declare what it reads",
    )
    for name in operator.inputs:
        _require(name in graph.tensors, f"{place} reads {name!r}, which does not exist")
        producer = graph.tensors[name].producer
        _require(producer is None or producer < position, f"{place} reads {name!r} before it is made")
        _require(
            position in graph.tensors[name].consumers,
            f"tensor {name!r} does not list its consumer {position}",
        )
    for name in operator.outputs:
        _require(name is None or name in graph.tensors, f"{place} makes {name!r}, which does not exist")
    _require(
        set(operator.parameters) <= graph.parameters.keys(), f"{place} reads a parameter that does not exist"
    )
    _require(set(operator.buffers) <= graph.buffers.keys(), f"{place} reads a buffer that does not exist")
    _require(
        set(operator.mutated_buffers) <= set(operator.buffers), f"{place} changes a buffer it does not read"
    )


def _check_sizes(graph: ModelGraph) -> None:
    _require(graph.example.keys() == graph.symbols.keys(), "the example does not give each symbol a value")
    sizes = [size for tensor in graph.tensors.values() for size in tensor.shape]
    sizes += [*graph.conditions]
    sizes += [storage.size_bytes for storage in (*graph.saved, *graph.memory)]
    arguments = [a for o in graph.operators for a in (*o.args, *o.kwargs.values())]
    sizes += [what for kind, what in _references(arguments) if kind == "size"]
    compile_sizes(sizes, tuple(graph.symbols))(graph.example)
    numbers = [what for kind, what in _references(arguments) if kind == "number"]
    compile_numbers(numbers, tuple(graph.symbols))(graph.example)


def _references(value: Any) -> Iterator[tuple[str, Any]]:
    """Kind and content of every reference in an operator's arguments."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict):
        yield from value.items()


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidInput(f"the graph is inconsistent: {message}")
