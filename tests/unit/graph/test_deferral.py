from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from forescale.graph.capture import CapturedModel, capture
from forescale.graph.deferral import Deferral
from forescale.graph.program import compile_program
from forescale.graph.separable import separable_operators

CPU = torch.device("cpu")
Gradients = dict[str, Tensor | None]


class Mixed(nn.Module):
    """A tied embedding, a weight read twice, a frozen layer, matmuls with parameters, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.half_frozen = nn.Linear(6, 6)
        self.half_frozen.weight.requires_grad_(False)
        self.norm = nn.LayerNorm(6)
        self.free = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = functional.relu(self.twice(functional.gelu(self.twice(x))))
        x = self.norm(self.half_frozen(self.frozen(x)) + x @ self.free)
        x = torch.addmm(self.bias, x.flatten(0, 1), self.free.t()).view(x.shape)
        return functional.linear(x, self.tokens.weight)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.second(functional.relu(self.norm(self.first(x)))))


def tokens() -> Tensor:
    return torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def made(model: Callable[[], nn.Module], x: Tensor, autocast: torch.dtype | None = None) -> CapturedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return capture(model(), (x,), {}, autocast)


def gradients(captured: CapturedModel, x: Tensor, deferral: Deferral | None) -> tuple[Gradients, Tensor]:
    """After one backward: of all parameters, and of the input."""
    graph = captured.graph
    every = range(len(graph.operators))
    wraps = deferral.wraps(graph, every) if deferral else None
    program = compile_program(graph, every, graph.outputs, CPU, captured.modules, wraps)
    for name in graph.parameters:
        captured.state[name].grad = None
    fed = x.detach().clone().requires_grad_(x.is_floating_point())
    state = [captured.state[name] for name in program.state]
    binding = graph.bind({graph.inputs[0]: tuple(x.shape)})
    (output,) = program.function(state, [fed], program.sizes(binding), lambda _: None, True)
    output.float().square().mean().backward()
    found = {name: captured.state[name].grad for name in graph.parameters}
    return found, fed.grad if fed.grad is not None else torch.zeros(())


CASES = {
    "mixed": (Mixed, tokens(), None),
    "mixed, bfloat16": (Mixed, tokens(), torch.bfloat16),
    "convolutions": (Convolutions, images(), None),
    "convolutions, bfloat16": (Convolutions, images(), torch.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_in_two_parts_are_those_in_one(name: str) -> None:
    make, x, autocast = CASES[name]
    expected, of_input = gradients(made(make, x, autocast), x, None)
    captured, deferral = made(make, x, autocast), Deferral()
    early, of_input_then = gradients(captured, x, deferral)
    assert torch.equal(of_input_then, of_input)
    waiting = deferral.take()
    apart = separable_operators(captured.graph, range(len(captured.graph.operators)))
    assert sorted(rest.operator for rest in waiting) == sorted(apart)
    own = {p for index in apart for p in captured.graph.operators[index].parameters}
    assert all(early[p] is None for p in own if autocast is None)
    assert not deferral.take()
    for rest in waiting:
        rest.accumulate()
    for parameter, gradient in expected.items():
        found = captured.state[parameter].grad
        assert (found is None) == (gradient is None)
        if gradient is not None and found is not None:
            # What is read twice is added up in another order, under autocast in another precision.
            torch.testing.assert_close(found, gradient, rtol=2e-2 if autocast else 1e-5, atol=1e-6)


def test_what_can_wait_is_read_from_parameters_only() -> None:
    graph = made(Mixed, tokens()).graph
    apart = separable_operators(graph, range(len(graph.operators)))
    kinds = sorted(graph.operators[index].target.split(".")[1] for index in apart)
    assert kinds == ["addmm", "embedding", "linear", "linear", "linear", "linear", "matmul"]
    (half_frozen,) = (i for i in apart if "half_frozen.bias" in graph.operators[i].parameters)
    assert apart[half_frozen] == (2,)


def test_a_cast_in_another_stage_is_a_tensor_like_any_other() -> None:
    graph = made(Convolutions, images(), torch.bfloat16).graph
    (first, *_) = separable_operators(graph, range(len(graph.operators)))
    assert first not in separable_operators(graph, range(first, len(graph.operators)))


def test_a_forward_that_will_be_run_again_keeps_nothing() -> None:
    captured, deferral = made(Mixed, tokens(), torch.bfloat16), Deferral()
    with torch.no_grad(), pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
        gradients(captured, tokens(), deferral)  # until its backward
    assert not deferral.take()


def test_where_no_gradient_arrives_none_is_made() -> None:
    class Stopped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> None:
            return None

    graph, deferral = made(Mixed, tokens()).graph, Deferral()
    wraps = deferral.wraps(graph, range(len(graph.operators)))
    linear = next(i for i in wraps if "twice.weight" in graph.operators[i].parameters)
    weight, bias = torch.ones(3, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    x = torch.ones(2, 3, requires_grad=True)
    result = wraps[linear](torch.ops.aten.linear.default)(x, weight, bias)
    Stopped.apply(result).sum().backward()
    assert not deferral.take()
    assert x.grad is None


def test_a_result_that_the_loss_does_not_use_leaves_no_gradient() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.used(x), self.unused(x).detach()])

    x = torch.randn(2, 3)
    captured, deferral = made(Unused, x), Deferral()
    gradients(captured, x, deferral)
    for rest in deferral.take():
        rest.accumulate()
    assert captured.state["unused.weight"].grad is None
    assert captured.state["used.weight"].grad is not None
