from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from forescale.core.clock import SystemClock
from forescale.graph.capture import CapturedModel, capture
from forescale.profile.halves import Half
from forescale.profile.measurement import OperatorMeasurement
from forescale.profile.operators import measure_operators


class Branches(nn.Module):
    """A pair of layers split by columns and rows, channels that are gathered, and a rest that is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)
        self.mix = nn.Conv1d(8, 33, 3, padding=1)
        self.head = nn.Linear(33, 3)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        hidden_BTC = x_BTC + self.down(functional.gelu(self.up(x_BTC)))
        mixed_BCT = self.mix(hidden_BTC.transpose(1, 2))
        return self.head(mixed_BCT.transpose(1, 2).log_softmax(-1))


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    torch.manual_seed(0)
    return capture(Branches(), (torch.randn(4, 6, 8),))


@pytest.fixture(scope="module")
def half(captured: CapturedModel) -> Half:
    found = Half.of(captured)
    assert found is not None
    return found


def loss(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def measurement(forward_s: list[float], backward_s: list[float]) -> OperatorMeasurement:
    return OperatorMeasurement(
        binding={},
        forward_s_O=np.array(forward_s),
        backward_s_O=np.array(backward_s),
        input_s_O=np.array(backward_s),
        weight_s_O=np.zeros(len(backward_s)),
        loss_forward_s=0.0,
        loss_backward_s=0.0,
        loss_saved_bytes=0.0,
    )


def test_a_half_holds_half_of_what_is_split(captured: CapturedModel, half: Half) -> None:
    assert {"up.weight", "down.weight"} <= set(half.shard.slices)
    assert torch.equal(half.captured.state["up.weight"], captured.state["up.weight"][:32])
    assert torch.equal(half.captured.state["down.weight"], captured.state["down.weight"][:, :32])


def test_a_half_runs_alone_forward_and_backward(captured: CapturedModel, half: Half) -> None:
    batch = torch.randn(5, 6, 8)
    (measured,), unsplit_O = measure_operators(
        captured, [([batch], loss)], half=half, clock=SystemClock(), budget_s=0.0
    )
    assert (measured.forward_s_O > 0).all()
    assert unsplit_O is not None
    split = {o for o, f in zip(half.shard.origin_O, half.shard.fraction_O, strict=True) if o >= 0 and f < 1}
    assert split
    whole = [o for o in range(len(unsplit_O)) if o not in split]
    assert (unsplit_O[whole] == 0).all()
    assert ((unsplit_O >= 0) & (unsplit_O <= 1)).all()


def test_what_does_not_shrink_with_the_part_is_found(half: Half) -> None:
    fraction_O = dict(zip(half.shard.origin_O, half.shard.fraction_O, strict=True))
    count = max(half.shard.origin_O) + 1
    split = next(o for o, fraction in fraction_O.items() if o >= 0 and fraction == 0.5)
    whole = measurement([3.0] * count, [5.0] * count)

    def found(seconds: float) -> float:
        own = [seconds if origin == split else 4.0 for origin in half.shard.origin_O]
        return float(half.unsplit_O(whole, measurement(own, [0.0] * len(own)))[split])

    assert found(4.0) == 0.0
    assert found(6.0) == pytest.approx(0.5)
    assert found(8.0) == pytest.approx(1.0)
    assert (found(3.0), found(9.0)) == (0.0, 1.0)  # noise


def test_a_model_of_which_nothing_can_be_split_has_no_half() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Flatten())
    assert Half.of(capture(model, (torch.randn(4, 1),))) is None


def test_a_half_keeps_the_models_own_state(captured: CapturedModel, half: Half) -> None:
    before = {name: value.clone() for name, value in captured.state.items()}
    measure_operators(captured, [([torch.randn(5, 6, 8)], loss)], half=replace(half), budget_s=0.0)
    assert all(torch.equal(captured.state[name], value) for name, value in before.items())
