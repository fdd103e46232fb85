"""What every operator costs: FLOPs and bytes as functions of the batch's shape.

FLOPs are those the mathematics asks for: a multiplication with its addition counts 2, an elementwise
operator 1 per output element, a view nothing. Bytes are those an operator must move between memory
and the processor if it keeps nothing in caches: operands read, results written. Together they place an
operator on a roofline (Williams et al. 2009); absolute seconds come from measurement.

Backward counts only what training computes: the gradients of tensors and parameters that need one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forescale.graph.flops import GATHERS, VIEWS, Call, materialised_scores, operator_flops
from forescale.graph.model import ModelGraph, Operator, Size
from forescale.graph.size import compile_sizes, product, tensor_bytes, total

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCost:
    """Cost of one operator for one microbatch, as expressions over the graph's symbols."""

    forward_flops: Size
    backward_flops: Size
    forward_bytes: Size
    backward_bytes: Size


@dataclass(frozen=True, slots=True, kw_only=True)
class CostArrays:
    """Costs of all operators for one microbatch (O = operator)."""

    forward_flops_O: Array
    backward_flops_O: Array
    forward_bytes_O: Array
    backward_bytes_O: Array


def operator_costs(graph: ModelGraph) -> tuple[OperatorCost, ...]:
    """The cost of every operator, in the graph's order."""
    return tuple(_cost(graph, operator) for operator in graph.operators)


def cost_table(graph: ModelGraph) -> Callable[[Mapping[str, int]], CostArrays]:
    """Compiles all costs once; the result maps a binding of the symbols to arrays."""
    costs = operator_costs(graph)
    sizes = [
        *(c.forward_flops for c in costs),
        *(c.backward_flops for c in costs),
        *(c.forward_bytes for c in costs),
        *(c.backward_bytes for c in costs),
    ]
    values = compile_sizes(sizes, tuple(graph.symbols))

    def table(binding: Mapping[str, int]) -> CostArrays:
        forward_flops, backward_flops, forward_bytes, backward_bytes = np.array(
            values(binding), dtype=np.float64
        ).reshape(4, len(costs))
        return CostArrays(
            forward_flops_O=forward_flops,
            backward_flops_O=backward_flops,
            forward_bytes_O=forward_bytes,
            backward_bytes_O=backward_bytes,
        )

    return table


def _cost(graph: ModelGraph, operator: Operator) -> OperatorCost:
    call = Call(graph, operator)
    forward_flops, backward_flops = operator_flops(call)
    forward_bytes, backward_bytes = (0, 0) if call.name in VIEWS else _traffic(graph, operator, call)
    return OperatorCost(
        forward_flops=forward_flops,
        backward_flops=backward_flops,
        forward_bytes=forward_bytes,
        backward_bytes=backward_bytes,
    )


def _traffic(graph: ModelGraph, operator: Operator, call: Call) -> tuple[Size, Size]:
    """Bytes moved by the forward and by the backward.

    Backward reads the results' gradients and the operands, writes a gradient for each operand that needs
    one, and adds a parameter's gradient to what earlier microbatches left there (read and write again).
    """
    tensors = [graph.tensors[name] for name in operator.inputs]
    parameters = [graph.parameters[name] for name in operator.parameters]
    buffers = [graph.buffers[name] for name in operator.buffers]
    results = [graph.tensors[name] for name in operator.outputs if name]
    made = total(tensor_bytes(t.shape, t.dtype) for t in results)
    read = total(tensor_bytes(t.shape, t.dtype) for t in (*tensors, *parameters, *buffers))
    if call.name in GATHERS:  # only the rows that are asked for
        read = total(
            (made, *(tensor_bytes(t.shape, t.dtype) for t in tensors if not t.dtype.startswith("float")))
        )
    flowing = [tensor_bytes(t.shape, t.dtype) for t in tensors if t.requires_grad]
    trained = [product((3, tensor_bytes(p.shape, p.dtype))) for p in parameters if p.trainable]
    spilled = materialised_scores(call)
    if not flowing and not trained:
        return total((made, read, spilled)), 0
    return total((made, read, spilled)), total((made, read, *flowing, *trained, spilled))
