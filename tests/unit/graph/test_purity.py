from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forescale.core.errors import CaptureFailed, InvalidInput
from forescale.graph.capture import capture


class Remembering(nn.Module):
    """Sets an attribute in every call, and may read it in the next."""

    def __init__(self, start: Any, *, reads: bool) -> None:
        super().__init__()
        self.layer, self.memory, self.reads = nn.Linear(8, 8), start, reads
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.reads and self.memory is not None:
            y = y + self.memory
        self.memory = 1 + self.memory if isinstance(self.memory, int) else y.detach().mean(0)
        self.mean = 0.9 * self.mean + y.detach().mean(0)
        return y + self.mean


@pytest.mark.parametrize("start", [0, None, torch.zeros(8)], ids=["counter", "none", "tensor"])
def test_a_result_that_depends_on_an_earlier_call_is_refused(start: Any) -> None:
    with pytest.raises(CaptureFailed, match=r"an earlier call left in memory; make it a buffer"):
        capture(Remembering(start, reads=True), (torch.randn(4, 8),))


@pytest.mark.parametrize("start", [0, None, torch.zeros(8)], ids=["counter", "none", "tensor"])
def test_an_attribute_that_nobody_reads_does_no_harm_and_stays_as_it_was(start: Any) -> None:
    model = Remembering(start, reads=False)
    buffer = model.mean
    capture(model, (torch.randn(4, 8),))
    assert model.memory is start
    assert model.mean is buffer
    assert torch.equal(buffer, torch.zeros(8))


def test_hooks_on_gradients_are_refused() -> None:
    class Reversed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            result = super().forward(x)
            result.register_hook(lambda gradient: -gradient)
            return result

    with pytest.raises(CaptureFailed, match="hook on a tensor's gradient"):
        capture(Reversed(8, 8), (torch.randn(4, 8),))
    on_parameter, on_module = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8))
    on_parameter.get_parameter("0.weight").register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(CaptureFailed, match=r"the parameter 0\.weight has a hook"):
        capture(on_parameter, (torch.randn(4, 8),))
    on_module[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(CaptureFailed, match="the module 0 has a backward hook"):
        capture(on_module, (torch.randn(4, 8),))


def test_a_number_of_rows_that_became_a_constant_cannot_be_split() -> None:
    class Contrasted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(x)[torch.arange(len(x))]

    graph = capture(Contrasted(8, 8), (torch.randn(6, 8),)).graph
    assert graph.part({}, 6, 6) == {}
    with pytest.raises(InvalidInput, match="exactly 6 rows"):
        graph.part({}, 6, 3)


def test_memory_in_one_module_of_a_chain_is_refused_too() -> None:
    with pytest.raises(CaptureFailed, match=r"earlier call left in 1\.memory"):
        capture(nn.Sequential(nn.Linear(8, 8), Remembering(0, reads=True)), (torch.randn(4, 8),))
