"""Runs a captured model in this process, cut into stages as training would cut it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from forescale.graph.capture import CapturedModel
from forescale.graph.program import compile_program
from forescale.graph.size import evaluate

CPU = torch.device("cpu")


class StagedRun:
    """A captured model with parameters and buffers of its own.

    Args:
        stages: operators are dealt to so many stages, in captured order.
    """

    def __init__(self, captured: CapturedModel, stages: int = 3) -> None:
        self.captured = captured
        self.state: dict[str, Tensor] = {}
        for name, value in captured.state.items():
            own = value.detach().clone()
            self.state[name] = (
                nn.Parameter(own, value.requires_grad) if name in captured.graph.parameters else own
            )
        count = len(captured.graph.operators)
        cuts = [count * stage // stages for stage in range(stages + 1)]
        self._stages = [range(a, b) for a, b in pairwise(cuts) if a < b]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        graph = self.captured.graph
        values = self.captured.inputs.feed(args, kwargs)
        binding = graph.bind({name: tuple(tensor.shape) for name, tensor in values.items()})
        self.captured.check(binding)
        for operators in self._stages:
            values |= self._run(operators, values, binding)
        for update in graph.buffer_updates:
            self.state[update.buffer] = values[update.tensor].detach()
        return self.captured.output.rebuild(values)

    def _run(
        self, operators: Sequence[int], values: Mapping[str, Tensor], binding: Mapping[str, int]
    ) -> dict[str, Tensor]:
        graph = self.captured.graph
        made = [name for index in operators for name in graph.operators[index].outputs if name]
        program = compile_program(graph, operators, made, CPU, self.captured.modules)
        state = [self.state[name] for name in program.state]
        inputs = [values[name] for name in program.inputs]
        results = program.function(state, inputs, program.sizes(binding), _reseed, True)
        found = dict(zip(program.outputs, results, strict=True))
        for name, tensor in found.items():
            expected = graph.tensors[name]
            assert tuple(tensor.shape) == tuple(evaluate(size, binding) for size in expected.shape)
            assert str(tensor.dtype) == f"torch.{expected.dtype}"
            assert tensor.requires_grad == expected.requires_grad
        return found


def _reseed(operator: int) -> None:
    torch.manual_seed(operator)
