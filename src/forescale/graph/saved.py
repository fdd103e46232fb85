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

    Args:
        modules: callables for ``module:PATH`` targets.
        device: whose kernels are asked what they keep (which attention runs depends on it).
    """
    shapes = SymbolicShapes(graph, device)
    with shapes.mode:
        state = {
            name: torch.empty(value.shape, dtype=getattr(torch, value.dtype), device=device)
            for name, value in {**graph.parameters, **graph.buffers}.items()
        }
        for name, parameter in graph.parameters.items():
            if parameter.trainable:
                state[name].requires_grad_().grad = torch.empty_like(state[name])
        inputs = {name: shapes.empty(graph.tensors[name]) for name in graph.inputs}
        journal = _Journal(graph, state, inputs)
        one_by_one = OneByOne(graph, state, device, modules or {})
        with journal.record:
            one_by_one.run(inputs, shapes.binding, journal)
    return replace(
        graph,
        saved=tuple(replace(kept, size_bytes=shapes.size(kept.size_bytes)) for kept in journal.saved()),
        memory=tuple(replace(event, size_bytes=shapes.size(event.size_bytes)) for event in journal.events),
    )


@dataclass(slots=True)
class _Kept:
    """A storage that some backward needs; ``operators`` as keys, in order."""

    size_bytes: Any
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
