"""Whether arrays are what a signature says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve.arrays import DTYPES, Array


class Misfit(Exception):
    """Arrays are not what the signature says; the message names the first and both sides."""


def conform(
    arrays: Mapping[str, object], specs: Sequence[TensorSpec], what: str, *, rows: int | None = None
) -> None:
    """Compare arrays with what they should be.

    Args:
        what: they are: "input" or "output".
        rows: how many each must have; None: equally many, and at least one.

    Raises:
        Misfit: a name, type, shape or number of rows is not as it should be.
    """
    names = [spec.name for spec in specs]
    if sorted(arrays) != sorted(names):
        raise Misfit(f"the {what}s are {sorted(arrays)}, not {sorted(names)}")
    for spec in specs:
        array = arrays[spec.name]
        if not isinstance(array, np.ndarray):
            raise Misfit(f"{what} {spec.name} is a {type(array).__name__}, not an array")
        if array.dtype != DTYPES[spec.datatype]:
            raise Misfit(f"{what} {spec.name} is {array.dtype}, not {spec.datatype}")
        if array.ndim != len(spec.shape) or any(
            wanted not in (None, length)
            for wanted, length in zip(spec.shape[1:], array.shape[1:], strict=True)
        ):
            raise Misfit(f"{what} {spec.name} has shape {array.shape}, not {_shape(spec)}")
        rows = rows if rows is not None else max(array.shape[0], 1)
        if array.shape[0] != rows:
            raise Misfit(f"{what} {spec.name} has {array.shape[0]} rows, not {rows}")


def rows_of(arrays: Mapping[str, Array]) -> int:
    """Rows of arrays that conform."""
    return next(iter(arrays.values())).shape[0]


def _shape(spec: TensorSpec) -> str:
    return f"({', '.join('any' if length is None else str(length) for length in spec.shape)})"


def check_outputs(outputs: Mapping[str, Array], signature: Signature, rows: int) -> None:
    """ValueError if they are not what the signature says, or not a row for each."""
    for spec in signature.outputs:
        if spec.name not in outputs:
            raise ValueError(f"output {spec.name} is missing")
        if outputs[spec.name].shape[:1] != (rows,):
            raise ValueError(f"output {spec.name} has shape {outputs[spec.name].shape} for {rows} rows")
