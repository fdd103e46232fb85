"""What a served model takes and gives: named tensors, as the Open Inference Protocol spells them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

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
