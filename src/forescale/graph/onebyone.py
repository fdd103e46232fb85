"""Runs a model's operators one by one, forward and backward, and says which one's turn it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from forescale.graph.model import ModelGraph
from forescale.graph.program import compile_program


class Turns(Protocol):
    """Learns whose turn it is."""

    def turn(self, operator: int, *, backward: bool) -> None:
        """What happens next belongs to ``operator`` (the number of operators: to the loss)."""
        ...

    def sum_gradients(self) -> None:
        """What happens next is that autograd adds up gradients, until the next turn."""
        ...

    def made(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor of the graph exists now."""
        ...

    def keep(self, tensor: torch.Tensor) -> None:
        """The backward of the operator whose turn it is needs ``tensor``."""
        ...


class OneByOne:
    """A pass over the whole model that keeps values alive exactly as a compiled stage does."""

    def __init__(
        self,
        graph: ModelGraph,
        state: Mapping[str, torch.Tensor],
        device: torch.device,
        modules: Mapping[str, Callable[..., Any]],
    ) -> None:
        self._graph = graph
        self._state = state
        self._programs = [
            compile_program(graph, [o.index], [n for n in o.outputs if n], device, modules)
            for o in graph.operators
        ]
        self._last_use = {name: o.index for o in graph.operators for name in (*o.outputs, *o.inputs) if name}

    def run(self, inputs: Mapping[str, torch.Tensor], binding: Mapping[str, Any], turns: Turns) -> None:
        """One forward, and one backward from gradients for all outputs.

        Args:
            binding: the graph's symbols; ints, or ``torch.SymInt`` for symbolic shapes.
        """
        with torch.enable_grad():
            outputs = self._forward(dict(inputs), binding, turns)
            turns.turn(len(self._graph.operators), backward=True)
            if outputs:
                torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])

    def _forward(
        self, values: dict[str, torch.Tensor], binding: Mapping[str, Any], turns: Turns
    ) -> Sequence[torch.Tensor]:
        owned: set[Any] = set()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            turns.keep(tensor)
            return tensor

        for operator, program in zip(self._graph.operators, self._programs, strict=True):
            turns.turn(operator.index, backward=False)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                made = program.function(
                    [self._state[name] for name in program.state],
                    [values[name] for name in program.inputs],
                    program.sizes(binding),
                    lambda _: None,
                    True,
                )
            for name, tensor in zip(program.outputs, made, strict=True):
                values[name] = tensor
                turns.made(name, tensor)
                _own(tensor.grad_fn, operator.index, owned, turns)
            del made
            for name in {*operator.inputs, *program.outputs}:
                if self._last_use[name] == operator.index and name not in self._graph.outputs:
                    del values[name]
        return [tensor for name in self._graph.outputs if (tensor := values[name]).requires_grad]


def _own(node: Any, operator: int, owned: set[Any], turns: Turns) -> None:
    """From now on, what autograd does for ``operator`` is announced as its backward."""
    pending = [node]
    while pending:
        node = pending.pop()
        # The accumulation of a parameter's gradient belongs to whichever operator has just made it.
        if node is None or node in owned or node.name().endswith("AccumulateGrad"):
            continue
        owned.add(node)
        node.register_prehook(lambda _: turns.turn(operator, backward=True))
        node.register_hook(lambda *_: turns.sum_gradients())
        pending += [earlier for earlier, _ in node.next_functions]
