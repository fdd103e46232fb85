from __future__ import annotations

import copy
from collections.abc import Callable

import cloudpickle
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from forescale.core.errors import CaptureFailed, InvalidInput
from forescale.graph.capture import capture
from forescale.graph.modules import chain_of_modules
from models import Moody
from staged_run import StagedRun


class Straight(nn.Module):
    """Calls its modules one after the other, in a forward of its own; the first and the last are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(Moody() for _ in range(3))
        self.leave.weight = self.enter.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


class Skipping(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.layers[0](x)) + x


class Choosing(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) if x.sum() > 0 else self.leave(x)


class Scaled(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.moody = Scaled(), Moody()

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.moody(self.scaled(x, y))


class Answer(nn.Module):
    def forward(self, x: Tensor) -> dict[str, object]:
        return {"sum": x.sum(1), "both": (x, x * 2), "name": "answer"}


def test_a_chain_is_cut_between_its_modules() -> None:
    graph = capture(nn.Sequential(Straight(), nn.Tanh()), (torch.randn(4, 8),)).graph
    assert [operator.target for operator in graph.operators] == [
        *("module:0.enter", "module:0.layers.0", "module:0.layers.1", "module:0.layers.2", "module:0.leave"),
        "module:1",
    ]
    assert graph.parameters["0.enter.weight"].aliases == ("0.leave.weight",)
    assert {tensor.shape for tensor in graph.tensors.values() if tensor.requires_grad} == {("rows", 8)}
    assert len(graph.buffer_updates) == 3 * 4


CHAINS: list[Callable[[], nn.Module]] = [
    Straight,
    lambda: nn.Sequential(Moody(), nn.Sequential(nn.Linear(8, 8), Moody()), nn.Tanh()),
    lambda: nn.Sequential(Moody(), Choosing(), Answer()),
    lambda: nn.Sequential(Moody(), nn.Flatten(0), nn.Unflatten(0, (-1, 4)), nn.Linear(4, 2)),
]


@pytest.mark.parametrize("make", CHAINS, ids=["forward", "nested", "choice inside", "other rows"])
def test_a_chain_computes_what_the_model_computes(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    reference = copy.deepcopy(model)
    staged = StagedRun(capture(model, (torch.randn(6, 8),)))
    for rows in (6, 3, 4):
        for sign in (1, -1):  # both ways at the branches
            x = torch.randn(rows, 8) + sign
            (found, spec), (expected, same_spec) = (pytree.tree_flatten(m(x)) for m in (staged, reference))
            assert spec == same_spec
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(staged.state[name], buffer, rtol=0, atol=0)


def test_inputs_go_where_the_model_takes_them() -> None:
    model = TwoInputs()
    staged = StagedRun(capture(model, (), {"x": torch.randn(4, 8), "y": torch.randn(4, 8)}))
    x, y = torch.randn(3, 8), torch.zeros(3, 8)
    torch.testing.assert_close(staged(x=x, y=y), copy.deepcopy(model)(y, x))


@pytest.mark.parametrize("model", [Skipping(), Choosing(), Moody()], ids=["skip", "choice", "one module"])
def test_what_is_no_chain_is_refused_with_the_reason_of_the_first_attempt(model: nn.Module) -> None:
    with pytest.raises(CaptureFailed, match=r"operator aten\.gt\.Scalar at .*\.py:\d+: control flow"):
        capture(model, (torch.randn(4, 8),))


def test_a_module_called_twice_makes_no_chain() -> None:
    moody = Moody()
    assert chain_of_modules(nn.Sequential(moody, moody), (torch.randn(4, 8),), {}, None) is None


def test_modules_travel_without_their_parameters() -> None:
    captured = capture(nn.Sequential(Moody(64), Moody(64)), (torch.randn(4, 64),))
    assert len(cloudpickle.dumps(captured.modules)) < 64 * 64


def test_the_model_stays_as_it_was() -> None:
    model = Straight()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    capture(model, (torch.randn(4, 8),))
    after = model.state_dict(keep_vars=True)
    assert all(
        after[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items()
    )


def test_a_chain_with_a_norm_needs_two_rows() -> None:
    captured = capture(nn.Sequential(Moody(), nn.Tanh()), (torch.randn(4, 8),))
    captured.check({"rows": 2})
    with pytest.raises(InvalidInput):
        captured.check({"rows": 1})
