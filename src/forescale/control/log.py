"""A run's record: a header, then every event with the commands it led to, as JSON objects.

Encoding is exact: ``decode(encode(record)) == record``, floats included (JSON carries the shortest decimal
that reads back as the same double; NaN and the infinities are written as strings). Files are the business of
:mod:`forescale.engine.runlog`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from math import isfinite
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from forescale.control.policy import Policy
from forescale.core.errors import InvalidInput
from forescale.engine.messages import Command, Event

LOG_VERSION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """First record of a run, and of every resumption.

    Attributes:
        version: of the log's format.
        policy: the thresholds the run decided by.
        run: everything else that is needed to derive its decisions again (graph, costs, devices), as JSON
            values; written and read by the caller.
    """

    version: int = LOG_VERSION
    policy: Policy
    run: Mapping[str, Any]


Record = Header | Event | Command

_KINDS: Mapping[str, type] = {kind.__name__: kind for kind in get_args(Record)}


def encode(record: Record) -> dict[str, Any]:
    """A record as a JSON object with its type's name under ``"type"``."""
    return {"type": type(record).__name__, **_encoded(record)}


def decode(values: Mapping[str, Any]) -> Record:
    """The record that :func:`encode` made ``values`` of.

    Raises:
        InvalidInput: not a record, or of a version this release does not read.
    """
    kind = _KINDS.get(str(values.get("type")))
    if kind is None:
        raise InvalidInput(f"not a run log: unknown record type {values.get('type')!r}")
    if kind is Header and values.get("version") != LOG_VERSION:
        raise InvalidInput(
            f"the run log has version {values.get('version')!r}, this release reads version {LOG_VERSION}"
        )
    try:
        return _decoded(values, kind)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"damaged {kind.__name__} record in the run log: {error!r}") from error


def _encoded(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _encoded(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {name: _encoded(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encoded(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    return value


def _decoded(value: Any, kind: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return kind(**{name: _decoded(value[name], hint) for name, hint in _hints(kind).items()})  # type: ignore[operator] - a class
    if origin is UnionType:  # only ``X | None`` occurs
        return None if value is None else _decoded(value, next(a for a in arguments if a is not NoneType))
    if origin is tuple:
        return tuple(_decoded(item, arguments[0]) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return {name: _decoded(item, arguments[1]) for name, item in value.items()}
    if kind is float or (isinstance(kind, type) and issubclass(kind, Enum)):
        return kind(value)
    return value


@lru_cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)
