"""What a served model takes and gives: named tensors, as the Open Inference Protocol spells them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from forescale.core.errors import InvalidInput

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "FP32": 4,
    "FP64": 8,
}
"""Bytes of an element by data type of the Open Inference Protocol v2; those of numbers."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor by name.

    Attributes:
        datatype: one of ``ITEM_BYTES``.
        shape: with None for an axis of any length. The first axis counts rows: requests are
            joined and split along it.

    Raises:
        InvalidInput: another data type, no axis, or a length below 1.
    """

    name: str
    datatype: str
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidInput(f"{self.name!r} cannot name a tensor: use letters, digits and '_.:/-'")
        if self.datatype not in ITEM_BYTES:
            raise InvalidInput(
                f"{self.name}: data type {self.datatype!r} is not one of {', '.join(ITEM_BYTES)}"
            )
        if not self.shape or any(length is not None and length < 1 for length in self.shape):
            raise InvalidInput(
                f"{self.name}: shape {self.shape} needs an axis of rows, and lengths from 1 on"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """All inputs and outputs of a model, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        for what, specs in (("input", self.inputs), ("output", self.outputs)):
            names = [spec.name for spec in specs]
            if not names or len(set(names)) < len(names):
                raise InvalidInput(f"a model needs an {what}, and {what}s of different names, not {names}")


def signature_as_json(signature: Signature) -> dict[str, list[dict[str, Any]]]:
    """As the Open Inference Protocol spells a model's metadata: an axis of any length is -1."""
    return {
        side: [
            {
                "name": spec.name,
                "datatype": spec.datatype,
                "shape": [-1 if length is None else length for length in spec.shape],
            }
            for spec in specs
        ]
        for side, specs in (("inputs", signature.inputs), ("outputs", signature.outputs))
    }


def signature_from_json(fields: object) -> Signature:
    """What :func:`signature_as_json` wrote, or somebody by hand.

    Raises:
        InvalidInput: it is something else, or names, data types or shapes are not allowed.
    """
    match fields:
        case {"inputs": [*inputs], "outputs": [*outputs], **others} if not others:
            return Signature(
                inputs=tuple(map(_tensor_from_json, inputs)), outputs=tuple(map(_tensor_from_json, outputs))
            )
        case _:
            raise InvalidInput("a signature is an object with lists of 'inputs' and 'outputs', nothing else")


def _tensor_from_json(fields: object) -> TensorSpec:
    match fields:
        case {"name": str(name), "datatype": str(datatype), "shape": [*shape], **others} if not others:
            lengths = cast(list[object], shape)
        case _:
            raise InvalidInput(
                "each tensor of a signature is an object with 'name', 'datatype' and 'shape', nothing else"
            )
    if not all(type(length) is int and length >= -1 for length in lengths):
        raise InvalidInput(f"{name[:80]}: a shape is a list of lengths, -1 for any")
    known = cast(list[int], lengths)
    return TensorSpec(
        name=name, datatype=datatype, shape=tuple(None if length == -1 else length for length in known)
    )
