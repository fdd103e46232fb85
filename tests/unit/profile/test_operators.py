from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from clocks import Ticks
from forescale.core.clock import SystemClock
from forescale.graph.capture import CapturedModel, capture
from forescale.profile.operators import LEAST_PASSES, measure_operators, measure_optimizer


class Small(nn.Module):
    """Linear layers, BatchNorm, dropout, a tied weight and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x))
        return self.second(functional.dropout(functional.relu(hidden), 0.1)) + hidden


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    torch.manual_seed(0)
    return capture(Small(), (torch.randn(4, 8),))


def loss(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def test_operators_add_up_to_the_whole_pass(captured: CapturedModel) -> None:
    (measured,), _ = measure_operators(captured, [([torch.randn(6, 8)], loss)], clock=Ticks(), budget_s=0.0)
    # On this clock a whole forward takes one second, and a whole backward one.
    assert measured.forward_s_O.sum() + measured.loss_forward_s == pytest.approx(1.0)
    assert measured.backward_s_O.sum() + measured.loss_backward_s == pytest.approx(1.0)
    assert measured.total_s == pytest.approx(2.0)
    assert dict(measured.binding) == captured.graph.bind({captured.graph.inputs[0]: (6, 8)})


def test_every_operator_with_a_gradient_has_a_backward(captured: CapturedModel) -> None:
    (measured,), _ = measure_operators(captured, [([torch.randn(6, 8)], loss)], clock=Ticks(), budget_s=0.0)
    assert (measured.forward_s_O > 0).all()
    for operator in captured.graph.operators:
        carries = any(captured.graph.tensors[name].requires_grad for name in operator.outputs if name)
        if operator.parameters:
            assert measured.backward_s_O[operator.index] > 0
        if not carries:
            assert measured.backward_s_O[operator.index] == 0


def test_gradients_of_parameters_are_timed_apart_where_they_can_be(captured: CapturedModel) -> None:
    (measured,), _ = measure_operators(captured, [([torch.randn(6, 8)], loss)], clock=Ticks(), budget_s=0.0)
    for operator in captured.graph.operators:
        apart = operator.target == "aten.linear.default"
        assert (measured.weight_s_O[operator.index] > 0) == apart
        if not apart:
            assert measured.input_s_O[operator.index] == measured.backward_s_O[operator.index]
    assert (measured.input_s_O[measured.weight_s_O > 0] > 0).all()


def test_measuring_leaves_no_trace(captured: CapturedModel) -> None:
    before = {name: value.clone() for name, value in captured.state.items()}
    measure_operators(captured, [([torch.randn(6, 8)], loss)], clock=SystemClock(), budget_s=0.0)
    for name, value in captured.state.items():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_the_random_state_is_kept(captured: CapturedModel) -> None:
    batch = torch.randn(6, 8)
    random_state = torch.get_rng_state()
    measure_operators(captured, [([batch], loss)], clock=Ticks(), budget_s=0.0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_random_operators_are_seeded_as_training_does(captured: CapturedModel) -> None:
    seeded: list[int] = []
    measure_operators(
        captured, [([torch.randn(6, 8)], loss)], reseed=seeded.append, clock=Ticks(), budget_s=0.0
    )
    assert set(seeded) == {operator.index for operator in captured.graph.operators if operator.random}


def test_what_the_loss_keeps_is_counted(captured: CapturedModel) -> None:
    batch = torch.randn(6, 8)
    (plain,), _ = measure_operators(captured, [([batch], loss)], clock=Ticks(), budget_s=0.0)
    assert plain.loss_saved_bytes == 0  # square keeps its input only, which is the model's output
    (kept,), _ = measure_operators(
        captured, [([batch], lambda y: y.exp().sum())], clock=Ticks(), budget_s=0.0
    )
    assert kept.loss_saved_bytes == 6 * 8 * 4


def test_microbatches_take_turns(captured: CapturedModel) -> None:
    turns: list[int] = []

    def noted(output: torch.Tensor) -> torch.Tensor:
        turns.append(len(output))
        return loss(output)

    sizes = [([torch.randn(rows, 8)], noted) for rows in (2, 6)]
    measured, _ = measure_operators(captured, sizes, clock=Ticks(), budget_s=0.0)
    assert turns == [2, 6] + [2, 2, 2, 6, 6, 6] * LEAST_PASSES
    assert [m.binding for m in measured] == [
        captured.graph.bind({captured.graph.inputs[0]: (rows, 8)}) for rows in (2, 6)
    ]


def test_optimizer_cost_is_per_byte() -> None:
    seconds, ratio = measure_optimizer(torch.optim.AdamW, [(10, 10), (20,)], clock=Ticks(), budget_s=0.0)
    assert seconds == pytest.approx(1 / 480)
    assert ratio == pytest.approx(2.0, abs=0.05)
    _, ratio = measure_optimizer(
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        [(10, 10)],
        clip_norm=1.0,
        clock=Ticks(),
        budget_s=0.0,
    )
    assert ratio == 0.0


def test_a_model_without_parameters_needs_no_optimizer() -> None:
    assert measure_optimizer(torch.optim.AdamW, []) == (0.0, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_operators_are_measured_on_a_gpu(captured: CapturedModel) -> None:
    (measured,), _ = measure_operators(
        captured, [([torch.randn(6, 8)], loss)], device=torch.device("cuda"), budget_s=0.1
    )
    assert measured.backward_s_O.sum() > 0
    assert all(value.device.type == "cpu" for value in captured.state.values())
