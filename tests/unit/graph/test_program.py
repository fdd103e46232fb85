from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from forescale.core.errors import InvalidInput
from forescale.graph.capture import CapturedModel, capture
from forescale.graph.model import Operator
from forescale.graph.program import compile_program, libraries_of, register_operators, resolve_target
from models import GPT, TwoHeads

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    return capture(TwoHeads(), (torch.randn(4, 8),))


def test_a_program_takes_what_others_make_and_drops_what_nobody_reads_again(captured: CapturedModel) -> None:
    graph = captured.graph
    half = len(graph.operators) // 2
    program = compile_program(graph, range(half, len(graph.operators)), graph.outputs, CPU)
    producers = {name: graph.tensors[name].producer for name in program.inputs}
    assert all(producer is not None and producer < half for producer in producers.values())
    assert set(program.outputs) == set(graph.outputs)
    assert program.source.count("del ") >= len(graph.operators) - half - len(graph.outputs)


def test_an_output_that_is_an_input_is_passed_through(captured: CapturedModel) -> None:
    name = captured.graph.inputs[0]
    program = compile_program(captured.graph, [], [name], CPU)
    x = torch.randn(2, 8)
    (result,) = program.function([], [x], [], lambda _: None, True)
    assert result is x


def test_random_operators_are_seeded_before_they_draw() -> None:
    graph = capture(GPT(blocks=1, dropout=0.1), (torch.randint(0, 9, (2, 4)),)).graph
    program = compile_program(graph, range(len(graph.operators)), graph.outputs, CPU)
    for operator in graph.operators:
        assert (f"reseed({operator.index})" in program.source) == operator.random


def test_a_recomputation_leaves_running_statistics_alone() -> None:
    captured = capture(nn.BatchNorm1d(3), (torch.randn(4, 3),))
    graph = captured.graph
    program = compile_program(graph, range(len(graph.operators)), graph.outputs, CPU)
    state = [captured.state[name].detach().clone() for name in program.state]
    before = [tensor.clone() for tensor in state]
    program.function(state, [torch.randn(4, 3)], [], lambda _: None, False)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    program.function(state, [torch.randn(4, 3)], [], lambda _: None, True)
    assert not all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_sizes_are_computed_from_the_batch() -> None:
    graph = capture(GPT(blocks=1), (torch.randint(0, 9, (2, 4)),)).graph
    program = compile_program(graph, range(len(graph.operators)), graph.outputs, CPU)
    binding = graph.bind({graph.inputs[0]: (3, 7)})
    assert 7 in program.sizes(binding)
    assert 4 not in program.sizes(binding)


@pytest.mark.parametrize("target", ["aten.no_such_operator.default", "no_such_library.operator.default"])
def test_an_operator_that_is_not_registered_is_named(target: str) -> None:
    with pytest.raises(InvalidInput, match=target):
        resolve_target(target)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e-30, -0.0])
def test_numbers_keep_their_value(value: float, captured: CapturedModel) -> None:
    operator = Operator(
        index=0, name="filled", target="aten.full.default", args=([2], value), kwargs={}, outputs=("filled",),
        returns_tuple=False, module_path="", source="", random=False, inputs=(), parameters=(), buffers=(),
        mutated_buffers=(),
    )  # fmt: skip
    graph = replace(captured.graph, operators=(operator,))
    (result,) = compile_program(graph, [0], ["filled"], CPU).function([], [], [], lambda _: None, True)
    assert torch.equal(result.isnan(), torch.tensor([value] * 2).isnan())
    assert repr(float(result.double()[0])) == repr(float(torch.tensor(value).double()))


def test_libraries_of_operators_are_found_and_imported() -> None:
    @torch.library.custom_op("forescale_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x)

    captured = capture(Twice(), (torch.randn(4),))
    assert captured.libraries == libraries_of(captured.graph) == (__name__,)
    register_operators(captured.libraries)
    with pytest.raises(InvalidInput, match="no_such_module"):
        register_operators(["no_such_module"])
    assert capture(TwoHeads(), (torch.randn(4, 8),)).libraries == ()
