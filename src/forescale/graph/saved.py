"""What autograd keeps between forward and backward, and all other memory a training pass takes.

The operators run once, forward and backward, on fake tensors with symbolic shapes; every storage that
begins or ends is noted with the operator it belongs to. Kernels may take more memory for themselves than
the tensors they return; that depends on the device and is measured by :mod:`forescale.graph.kernels`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from itertools import product as product_of
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from forescale.graph.model import MemoryEvent, ModelGraph, Operator, SavedStorage, Size
from forescale.graph.onebyone import OneByOne
from forescale.graph.shortening import shortened
from forescale.graph.size import compile_sizes, product, tensor_bytes
from forescale.graph.storages import StorageRecord, SymbolicShapes

_CPU = torch.device("cpu")


def measure_saved(
    graph: ModelGraph,
    modules: Mapping[str, Callable[..., Any]] | None = None,
    device: torch.device = _CPU,
) -> ModelGraph:
    """The graph with ``saved`` and ``memory`` filled in, their sizes as expressions over its symbols.

    Gradients of parameters exist from the start, as for every microbatch of a step but its first. Of many
    equal blocks only some are run.
    Where some operator cannot compute with symbols, passes of several fixed sizes are compared instead.

    Args:
        modules: callables for ``module:PATH`` targets.
        device: whose kernels are asked what they keep (which attention runs depends on it).
    """
    if (shallow := shortened(graph)) is not None:
        whole = shallow.lengthened(measure_whole(shallow.short, modules or {}, device))
        if whole is not None:
            return whole
    return measure_whole(graph, modules or {}, device)


def measure_whole(
    graph: ModelGraph, modules: Mapping[str, Callable[..., Any]], device: torch.device = _CPU
) -> ModelGraph:
    """The same with every operator run, and no block taken to be like another."""
    runnable = replace(graph, operators=tuple(_with_explicit_size(graph, o) for o in graph.operators))
    shapes = SymbolicShapes(graph)
    try:
        journal = _run(runnable, modules, device, shapes.mode, shapes.binding)
    except RuntimeError:  # the base of all that fake tensors raise
        journal = None
    if journal is not None and shapes.general:
        return _filled(graph, journal, [shapes.size(event.size_bytes) for event in journal.events])
    return _compare(graph, runnable, modules, device)


def _filled(graph: ModelGraph, journal: _Journal, sizes: Sequence[Size]) -> ModelGraph:
    """The graph with a journal's findings; ``sizes``: one per event."""
    size_bytes = {event.storage: size for event, size in zip(journal.events, sizes, strict=True)}
    return replace(graph, saved=journal.saved(size_bytes), memory=journal.memory(size_bytes))


def _run(
    graph: ModelGraph,
    modules: Mapping[str, Callable[..., Any]],
    device: torch.device,
    mode: AbstractContextManager[Any],
    binding: Mapping[str, Any],
) -> _Journal:
    """One pass over tensors that hold zeros, or nothing under a fake ``mode``."""
    with mode:
        state = {
            name: torch.zeros(value.shape, dtype=getattr(torch, value.dtype), device=device)
            for name, value in {**graph.parameters, **graph.buffers}.items()
        }
        for name, parameter in graph.parameters.items():
            if parameter.trainable:
                state[name].requires_grad_().grad = torch.zeros_like(state[name])
        inputs: dict[str, torch.Tensor] = {}
        for name in graph.inputs:
            tensor = graph.tensors[name]
            shape = compile_sizes(tensor.shape, tuple(graph.symbols))(binding)
            inputs[name] = torch.zeros(shape, dtype=getattr(torch, tensor.dtype), device=device)
        journal = _Journal(graph, state, inputs)
        one_by_one = OneByOne(graph, state, device, modules)
        with journal.record:
            one_by_one.run(inputs, binding, journal)
    return journal


def _with_explicit_size(graph: ModelGraph, operator: Operator) -> Operator:
    """Interpolation with its output's size as argument: the form that computes with symbols."""
    found = re.fullmatch(r"(aten\._?upsample_\w+?(\d)d(?:_aa)?)\.vec", operator.target)
    if found is None or (name := operator.outputs[0]) is None:
        return operator
    axes = int(found[2])
    size = [s if isinstance(s, int) else {"size": s} for s in graph.tensors[name].shape[-axes:]]
    source, _, *corners, factors = operator.args
    scales = [float(f) for f in factors] if factors else [None] * axes
    return replace(operator, target=f"{found[1]}.default", args=(source, size, *corners, *scales))


@dataclass(slots=True)
class _Kept:
    """Who needs a storage for its backward, as keys, in order."""

    operators: dict[int, None] = field(default_factory=dict[int, None])


@dataclass(frozen=True, slots=True)
class _Event:
    """A :class:`~forescale.graph.model.MemoryEvent` in the making."""

    operator: int
    backward: bool
    storage: int
    size_bytes: Any
    begins: bool


class _Journal:
    """Notes what happens to storages, and in whose turn.

    Attributes:
        events: begin and end of storages, in order.
    """

    def __init__(
        self, graph: ModelGraph, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> None:
        self.events: list[_Event] = []
        self.record = StorageRecord(self._note)
        self._graph = graph
        self._operator, self._backward = -1, False
        self._kept: dict[int, _Kept] = {}
        self._state = {self.record.adopt(tensor) for tensor in state.values()}
        for tensor in state.values():
            if tensor.grad is not None:
                self.record.adopt(tensor.grad)
        self._names = {self.record.adopt(tensor): name for name, tensor in inputs.items()}

    def memory(self, size_bytes: Mapping[int, Size]) -> tuple[MemoryEvent, ...]:
        """The events, with storages named. ``size_bytes``: of every storage, by number."""
        return tuple(
            MemoryEvent(
                operator=event.operator,
                backward=event.backward,
                storage=self._names.get(event.storage, f"#{event.storage}"),
                size_bytes=size_bytes[event.storage],
                begins=event.begins,
            )
            for event in self.events
        )

    def saved(self, size_bytes: Mapping[int, Size]) -> tuple[SavedStorage, ...]:
        """What the backward needed, named after the tensors whose storage it is.

        Args:
            size_bytes: of every storage in ``events``, by number.
        """
        anonymous: dict[int, int] = {}
        found: list[SavedStorage] = []
        for number, kept in self._kept.items():
            operators = tuple(kept.operators)
            if (name := self._names.get(number)) is None:
                count = anonymous[operators[0]] = anonymous.get(operators[0], -1) + 1
                name = f"{self._graph.operators[operators[0]].name}#{count}"
            if (size := size_bytes.get(number)) is None:  # a batch input
                size = tensor_bytes(self._graph.tensors[name].shape, self._graph.tensors[name].dtype)
            found.append(SavedStorage(name=name, operators=operators, size_bytes=size))
        return tuple(found)

    def turn(self, operator: int, *, backward: bool) -> None:
        self._operator, self._backward = operator, backward
        self.record.summing = False

    def sum_gradients(self) -> None:
        self.record.summing = True

    def made(self, name: str, tensor: torch.Tensor) -> None:
        self._names.setdefault(self.record.number(tensor), name)

    def keep(self, tensor: torch.Tensor) -> None:
        number = self.record.number(tensor)
        if number not in self._state:
            self._kept.setdefault(number, _Kept()).operators.setdefault(self._operator)

    def _note(self, number: int, size_bytes: Any, begins: bool) -> None:
        self.events.append(_Event(self._operator, self._backward, number, size_bytes, begins))


def _compare(
    graph: ModelGraph,
    runnable: ModelGraph,
    modules: Mapping[str, Callable[..., Any]],
    device: torch.device,
) -> ModelGraph:
    """Passes at the example's sizes, and with one symbol doubled; sizes follow from how they grow."""
    bindings = [dict(graph.example)] + [{**graph.example, s: 2 * v} for s, v in graph.example.items()]
    mode: Callable[[], AbstractContextManager[Any]] = partial(FakeTensorMode, allow_non_fake_inputs=True)
    try:
        first = _run(runnable, modules, device, mode(), bindings[0])
    except RuntimeError:
        mode = nullcontext  # control flow that depends on values: only real tensors have some
        first = _run(runnable, modules, device, mode(), bindings[0])
    journals = [(bindings[0], first)]
    for binding in bindings[1:]:
        try:
            journal = _run(runnable, modules, device, mode(), binding)
        except RuntimeError:
            continue  # not every size fits every model
        if _course(journal) == _course(first):
            journals.append((binding, journal))
    known = _known_sizes(graph, [binding for binding, _ in journals])
    columns = list(
        zip(*([event.size_bytes for event in journal.events] for _, journal in journals), strict=True)
    )
    fitted = {column: _fitted(column, known) for column in set(columns)}
    return _filled(graph, first, [fitted[column] for column in columns])


def _course(journal: _Journal) -> list[tuple[int, bool, int, bool]]:
    return [(e.operator, e.backward, e.storage, e.begins) for e in journal.events]


def _known_sizes(graph: ModelGraph, bindings: Sequence[Mapping[str, int]]) -> dict[tuple[int, ...], Size]:
    """What a storage's size can be a multiple of, by its values: products of symbols and tensors."""
    shapes = dict.fromkeys(product(tensor.shape) for tensor in graph.tensors.values())
    factors: list[Size] = [1, *graph.symbols]
    sizes = [product(pair) for pair in (*product_of(factors, factors), *product_of(shapes, factors))]
    values = compile_sizes(sizes, tuple(graph.symbols))
    columns = zip(*(values(binding) for binding in bindings), strict=True)
    return {column: size for column, size in zip(columns, sizes, strict=True) if min(column) > 0}


def _fitted(column: Sequence[int], known: Mapping[tuple[int, ...], Size]) -> Size:
    """The expression that has the values of ``column``, else the least one that is nowhere below it."""
    if len(set(column)) == 1 and len(column) > 1:
        return column[0]

    def waste(values: tuple[int, ...]) -> float:
        factor = max(Fraction(c, v) for c, v in zip(column, values, strict=True))
        return float(sum(factor * v / max(c, 1) for c, v in zip(column, values, strict=True)))

    best = min(known, key=waste)
    factor = max(Fraction(c, v) for c, v in zip(column, best, strict=True))
    whole = product((factor.numerator, known[best]))
    return whole if factor.denominator == 1 else f"CeilDiv({whole}, {factor.denominator})"
