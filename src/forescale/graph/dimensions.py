"""Who has which factor in a graph: see :mod:`forescale.graph.factors`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from forescale.graph.factors import Axes
from forescale.graph.flops import Call, operator_flops
from forescale.graph.flow_rules import RULES
from forescale.graph.flows import Flow, Reading
from forescale.graph.model import Buffer, ModelGraph, Operator, Parameter, Tensor
from forescale.graph.size import evaluate, tensor_bytes

Key = tuple[str, str]
"""Kind (``tensor``, ``parameter`` or ``buffer``) and name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where a tensor is cut: its ``axis`` is outer x units x inner, and the units are shared out."""

    axis: int
    outer: int
    units: int
    inner: int


def state_of(operator: Operator) -> tuple[Key, ...]:
    """The parameters and buffers an operator reads."""
    return (*(("parameter", n) for n in operator.parameters), *(("buffer", n) for n in operator.buffers))


class Dimensions:
    """A graph's factors, and who has them."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self._reading = Reading(graph, RULES)
        leaves = self._reading.factors.leaves
        self._axes: dict[Key, Axes] = {
            key: tuple(leaves(axis) for axis in axes) for key, axes in self._reading.axes.items()
        }
        self._free = [frozenset(leaves(f.free) if f else ()) for f in self._reading.flows]
        self._summed = [frozenset(leaves(f.summed) if f else ()) for f in self._reading.flows]
        self._cuts: dict[tuple[str, str, int], Cut] = {}
        self._work: dict[int, float] = {}
        self.updated = {("buffer", update.buffer) for update in graph.buffer_updates}
        self.readers: dict[Key, list[int]] = {}
        for operator in graph.operators:
            for key in state_of(operator):
                self.readers.setdefault(key, []).append(operator.index)

    @cached_property
    def operators_of(self) -> Mapping[int, tuple[int, ...]]:
        """For every factor of a parameter, the operators whose operands or results have it, ascending."""
        found: dict[int, dict[int, None]] = {}
        for name in self.graph.parameters:
            for factor in (f for axis in self._axes["parameter", name] for f in axis):
                found.setdefault(factor, {})
        for operator in self.graph.operators:
            keys = [*state_of(operator), *(("tensor", n) for n in (*operator.inputs, *operator.outputs) if n)]
            for factor in {f for key in keys for axis in self._axes[key] for f in axis} & found.keys():
                found[factor][operator.index] = None
        return {factor: tuple(operators) for factor, operators in found.items()}

    def flow(self, operator: int) -> Flow | None:
        return self._reading.flows[operator]

    def units(self, factor: int) -> int:
        return self._reading.factors.size((factor,))

    def has(self, key: Key, factor: int) -> int:
        """How often a tensor, parameter or buffer has a factor."""
        return sum(axis.count(factor) for axis in self._axes[key])

    def cut(self, key: Key, factor: int) -> Cut:
        """Where a factor is in a tensor that has it once."""
        known = (*key, factor)
        if known not in self._cuts:
            axes, size = self._axes[key], self._reading.factors.size
            axis = next(k for k, factors in enumerate(axes) if factor in factors)
            place = axes[axis].index(factor)
            outer, inner = size(axes[axis][:place]), size(axes[axis][place + 1 :])
            self._cuts[known] = Cut(axis=axis, outer=outer, units=self.units(factor), inner=inner)
        return self._cuts[known]

    def is_fixed(self, key: Key, factor: int) -> bool:
        """Whether the axis with the factor is as long for every batch, so that parts can be put together."""
        return isinstance(self.entry(key).shape[self.cut(key, factor).axis], int)

    def sums_over(self, operator: int, factor: int) -> bool | None:
        """Whether an operator sums over a factor or lets it through; None if it does neither, or both."""
        free, summed = factor in self._free[operator], factor in self._summed[operator]
        return None if free == summed else summed

    def factors_in(self, operator: int, position: int) -> list[frozenset[int]]:
        """Factors of every axis that an argument gives the sizes of."""
        flow = self._reading.flows[operator]
        leaves = self._reading.factors.leaves
        return [frozenset(leaves(axis)) for axis in flow.sizes[position]] if flow else []

    def work(self, operator: int) -> float:
        """FLOPs of an operator's forward and backward, at the size of the example."""
        if operator not in self._work:
            flops = operator_flops(Call(self.graph, self.graph.operators[operator]))
            self._work[operator] = float(sum(evaluate(size, self.graph.example) for size in flops))
        return self._work[operator]

    def entry(self, key: Key) -> Tensor | Parameter | Buffer:
        kind, name = key
        if kind == "tensor":
            return self.graph.tensors[name]
        return self.graph.parameters[name] if kind == "parameter" else self.graph.buffers[name]

    def size_bytes(self, key: Key) -> float:
        """At the size of the example."""
        entry = self.entry(key)
        return float(evaluate(tensor_bytes(entry.shape, entry.dtype), self.graph.example))

    def has_gradient(self, key: Key) -> bool:
        match self.entry(key):
            case Tensor(requires_grad=needed) | Parameter(trainable=needed):
                return needed
            case Buffer():
                return False
