"""What autograd keeps between forward and backward, and all other memory a training pass takes.

The operators run once, forward and backward, on fake tensors with symbolic shapes; every storage that
begins or ends is noted with the operator it belongs to. Kernels may take more memory for themselves than
the tensors they return; that depends on the device and is measured by :mod:`forescale.graph.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from forescale.graph.model import MemoryEvent, ModelGraph, SavedStorage
from forescale.graph.onebyone import OneByOne
from forescale.graph.storages import StorageRecord, SymbolicShapes

_CPU = torch.device("cpu")


def measure_saved(
    graph: ModelGraph,
    modules: Mapping[str, Callable[..., Any]] | None = None,
    device: torch.device = _CPU,
) -> ModelGraph:
    """The graph with ``saved`` and ``memory`` filled in, their sizes as expressions over its symbols.

    Gradients of parameters exist from the start, as for every microbatch of a step but its first.
    Where some operator cannot compute with symbols, passes of several fixed sizes are compared instead.

    Args:
        modules: callables for ``module:PATH`` targets.
        device: whose kernels are asked what they keep (which attention runs depends on it).
    """
    runnable = replace(graph, operators=tuple(_with_explicit_size(graph, o) for o in graph.operators))
    shapes = SymbolicShapes(graph, device)
    try:
        journal = _run(runnable, modules or {}, device, shapes.mode, shapes.binding)
    except RuntimeError:  # the base of all that fake tensors raise
        journal = None
    if journal is not None and shapes.general:
        return _filled(graph, journal, [shapes.size(event.size_bytes) for event in journal.events])
    return _compare(graph, runnable, modules or {}, device)


def _filled(graph: ModelGraph, journal: _Journal, sizes: Sequence[Size]) -> ModelGraph:
    """The graph with a journal's findings; ``sizes``: one per event."""
    memory = tuple(replace(event, size_bytes=size) for event, size in zip(journal.events, sizes, strict=True))
    size_of = {event.storage: event.size_bytes for event in memory}
    return replace(graph, saved=journal.saved(size_of), memory=memory)


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
        journal = _Journal(graph, state, inputs, {n: tensor_bytes(graph.tensors[n].shape, graph.tensors[n].dtype) for n in inputs})
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


class _Journal:
    """Notes what happens to storages, and in whose turn.

    Attributes:
        events: begin and end of storages, in order.
    """

    def __init__(
        self, graph: ModelGraph, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> None:
        self.events: list[MemoryEvent] = []
        self.record = StorageRecord(self._note)
        self._graph = graph
        self._operator, self._backward = -1, False
        self._kept: dict[int, _Kept] = {}
        self._state = {self.record.adopt(tensor) for tensor in state.values()}
        for tensor in state.values():
            if tensor.grad is not None:
                self.record.adopt(tensor.grad)
        self._names = {self.record.adopt(tensor): name for name, tensor in inputs.items()}

    def saved(self) -> list[SavedStorage]:
        """What the backward needed, named after the tensors whose storage it is."""
        anonymous: dict[int, int] = {}
        found: list[SavedStorage] = []
        for number, kept in self._kept.items():
            operators = tuple(kept.operators)
            if (name := self._names.get(number)) is None:
                count = anonymous[operators[0]] = anonymous.get(operators[0], -1) + 1
                name = f"{self._graph.operators[operators[0]].name}#{count}"
            found.append(SavedStorage(name=name, operators=operators, size_bytes=kept.size_bytes))
        return found

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
            kept = self._kept.setdefault(number, _Kept(size_bytes=tensor.untyped_storage().nbytes()))
            kept.operators.setdefault(self._operator)

    def _note(self, number: int, size_bytes: Any, begins: bool) -> None:  # noqa: FBT001
        self.events.append(
            MemoryEvent(
                operator=self._operator,
                backward=self._backward,
                storage=number,
                size_bytes=size_bytes,
                begins=begins,
            )
        )
