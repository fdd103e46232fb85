"""Operators whose backward falls into two parts: the gradients of what flows, and those of parameters.

Only the first is needed by the stage before; the second can wait until the device would idle (Qi et al.,
*Zero Bubble Pipeline Parallelism*, ICLR 2024, §2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from forescale.graph.model import ModelGraph, Operator

_SEPARABLE = frozenset(
    {
        *("linear", "addmm", "mm", "matmul", "embedding"),
        *("convolution", "conv1d", "conv2d", "conv3d"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    }
)
# Their backward keeps nothing, so a gradient can go through it more than once.
_PASSING = frozenset({"to", "_to_copy", "t", "transpose", "permute"})


def separable_operators(graph: ModelGraph, operators: Iterable[int]) -> Mapping[int, tuple[int, ...]]:
    """Those of ``operators`` whose gradients of parameters can be computed apart, and later.

    What only casts or transposes parameters, as autocast does, among the same ``operators`` counts as a
    parameter: no other gradient waits for it.

    Returns:
        Index of the operator -> positions of its arguments that are trainable parameters.
    """
    derived: set[str] = set()
    found: dict[int, tuple[int, ...]] = {}
    for index in sorted(operators):
        operator = graph.operators[index]
        kind = _kind(operator)
        if not any(graph.tensors[name].requires_grad for name in operator.outputs if name):
            continue
        if kind in _PASSING and derived.issuperset(operator.inputs):
            derived.update(name for name in operator.outputs if name)
        elif kind in _SEPARABLE and not any(_is_state(graph, v, derived) for v in operator.kwargs.values()):
            arguments = enumerate(operator.args)
            positions = tuple(place for place, value in arguments if _is_state(graph, value, derived))
            if positions:
                found[index] = positions
    return found


def _kind(operator: Operator) -> str:
    """``aten.linear.default`` -> ``linear``."""
    library, _, rest = operator.target.partition(".")
    return rest.partition(".")[0] if library == "aten" else ""


def _is_state(graph: ModelGraph, value: Any, derived: set[str]) -> bool:
    match value:
        case {"parameter": name}:
            return graph.parameters[name].trainable
        case {"tensor": name}:
            return name in derived
        case _:
            return False
