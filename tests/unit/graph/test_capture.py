from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from forescale.core.errors import CaptureFailed, InvalidInput
from forescale.graph.capture import capture
from models import GPT, Mixture, ResNet, RunningMean, TwoHeads, UNet
from staged_run import StagedRun

HERE = Path(__file__).name


def line_of(text: str) -> int:
    """Number of the only line of this file that ends with a text."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if line.endswith(text)]
    return number


class Applied(nn.Module):
    """Modules and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*self.parts.values(), *inputs)


def linear(outputs: int = 8) -> nn.Linear:
    return nn.Linear(8, outputs)


def written_in_place(layer: nn.Module, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 2:4] = layer(x)[:, :2]
    y[x > 1] = 0.0
    return y.relu_() + layer(x)


def half_without_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(layer(x))
    return layer(x) * gate + layer(x.detach())


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=8)


def checkpointed(layer: nn.Module, x: Tensor) -> Tensor:
    result = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert isinstance(result, Tensor)
    return result


def attention(layer: nn.Module, x: Tensor, mask: Tensor) -> Any:
    return layer(x, x, x, key_padding_mask=mask)


def sequences(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(*shape, 8),)


def of_three(rows: int, _: int) -> tuple[Tensor, ...]:
    return sequences(rows, 3)


def masked(*shape: int) -> tuple[Tensor, ...]:
    return torch.randn(*shape, 8), torch.zeros(*shape, dtype=torch.bool)


def ids(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 16, shape),)


def pictures(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(shape[0], 3, 4 * shape[1], 16),)


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[..., tuple[Tensor, ...]]]] = {
    "gpt": (lambda: GPT(vocabulary=16, width=8, blocks=1, heads=2), ids),
    "gpt, tied": (lambda: GPT(vocabulary=16, width=8, blocks=1, heads=2, tied=True), ids),
    "resnet": (lambda: ResNet(4), pictures),
    "unet": (lambda: UNet(4), pictures),
    "instance norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        ),
        pictures,
    ),
    "attention": (
        lambda: Applied(attention, layer=nn.MultiheadAttention(8, 2, batch_first=True)),
        masked,
    ),
    "transformer": (
        lambda: Applied(lambda m, x: m(x, x[:, 1:]), m=nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True)),
        sequences,
    ),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(16, 8), linear()), ids),
    "einsum": (lambda: Applied(lambda m, x: torch.einsum("bti,oi->bot", x, m.weight), m=linear()), sequences),
    "checkpoint": (lambda: Applied(checkpointed, layer=nn.Sequential(linear(), nn.Tanh())), sequences),
    "complex": (lambda: nn.Sequential(linear(), Spectrum()), sequences),
    "weight norm": (lambda: parametrizations.weight_norm(linear()), sequences),
    "spectral norm": (lambda: parametrizations.spectral_norm(linear()), sequences),
    "gru": (
        lambda: Applied(lambda m, x: m(x.transpose(0, 1))[0], m=nn.GRU(8, 8)),
        lambda r, _: sequences(r, 3),
    ),
    "in place": (lambda: Applied(written_in_place, layer=linear()), lambda rows, _: sequences(rows)),
    "no_grad": (lambda: Applied(half_without_gradient, layer=linear()), sequences),
    "two heads": (TwoHeads, lambda rows, _: sequences(rows)),
    "running mean": (lambda: nn.Sequential(linear(), RunningMean(8)), lambda rows, _: sequences(rows)),
    "experts": (Mixture, lambda rows, _: sequences(rows)),
    "one output twice": (
        lambda: Applied(lambda m, x: [m(x), (m(x), x, m.weight), None, 3], m=linear()),
        sequences,
    ),
    "views of one parameter": (
        lambda: Applied(lambda m, x: functional.linear(m(x), m.weight.t()) @ m.weight[:, :3], m=linear()),
        sequences,
    ),
}


def loss(output: Any) -> Tensor:
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([t.double().square().mean() for t in tensors]).sum()


@pytest.mark.parametrize("name", MODELS)
def test_stages_compute_what_the_model_computes(name: str) -> None:
    """Outputs, gradients and buffers, for batches of several shapes, one row included."""
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model = make()
    reference = copy.deepcopy(model)
    staged = StagedRun(capture(model, batch(4, 6)))
    for shape in ((4, 6), (3, 9), (1, 5)):
        inputs = batch(*shape)
        found, expected = staged(*inputs), reference(*inputs)
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
        torch.testing.assert_close(loss(found), loss(expected), rtol=0, atol=1e-6)
        loss(found).backward()
        loss(expected).backward()
    for parameter_name, parameter in reference.named_parameters():
        gradient = staged.state[parameter_name].grad
        assert (gradient is None) == (parameter.grad is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5)
    for buffer_name, buffer in reference.named_buffers():
        torch.testing.assert_close(staged.state[buffer_name], buffer)


def test_tied_parameters_are_one_parameter_with_two_names() -> None:
    graph = capture(GPT(tied=True, blocks=1), ids(2, 4)).graph
    assert graph.parameters["tokens.weight"].aliases == ("head.weight",)
    assert "head.weight" not in graph.parameters
    assert len(graph.parameter_readers["tokens.weight"]) == 2


def test_every_axis_is_a_symbol_of_its_own_even_where_sizes_agree() -> None:
    graph = capture(GPT(blocks=1), ids(8, 8)).graph
    assert len(graph.symbols) == 2
    assert graph.bind({graph.inputs[0]: (3, 5)}).keys() == graph.symbols.keys()


def test_random_operators_are_marked() -> None:
    random = [o.target for o in capture(GPT(blocks=1, dropout=0.1), ids(2, 4)).graph.operators if o.random]
    assert sorted(set(random)) == ["aten.native_dropout.default", "aten.scaled_dot_product_attention.default"]
    assert not any(
        o.random for o in capture(GPT(blocks=1), ids(2, 4)).graph.operators if "dropout" not in o.target
    )


def test_operators_know_where_they_come_from() -> None:
    graph = capture(GPT(blocks=2), ids(2, 4)).graph
    (attention,) = [o for o in graph.operators if "attention" in o.target and o.module_path == "blocks.1"]
    assert attention.source.rpartition(":")[0].endswith("models.py")


def test_a_norm_changes_its_statistics_itself_and_stays_beside_them() -> None:
    for model in (nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)):
        graph = capture(model, pictures(2, 2)).graph
        (operator,) = [o for o in graph.operators if "_norm" in o.target]
        assert operator.mutated_buffers == ("running_mean", "running_var")


def test_modules_that_the_user_froze_stay_frozen() -> None:
    model = nn.Sequential(linear(), nn.BatchNorm1d(8), nn.Dropout(0.5))
    model[1].eval()
    model[2].eval()
    staged = StagedRun(capture(model, sequences(4)))
    x = torch.randn(4, 8)
    torch.testing.assert_close(staged(x), model(x))
    assert torch.equal(staged.state["1.running_mean"], torch.zeros(8))


def test_an_evaluated_model_is_put_into_training_mode() -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.5)).eval()
    assert any(o.random for o in capture(model, sequences(4)).graph.operators)


def test_autocast_is_captured_without_sharing_casts() -> None:
    graph = capture(GPT(blocks=2, tied=True), ids(2, 4), autocast=torch.bfloat16).graph
    assert "bfloat16" in {tensor.dtype for tensor in graph.tensors.values()}
    casts = [o for o in graph.operators if o.parameters and "_to_copy" in o.target]
    assert all(len(graph.tensors[name].consumers) == 1 for o in casts for name in o.outputs if name)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = self.layer(x) * scale
        return y if mask is None else y.masked_fill(mask, 0.0)


def test_parts_of_a_batch_are_found_by_name_not_by_order() -> None:
    x, mask = torch.randn(4, 8), torch.randn(4, 8) > 0
    staged = StagedRun(capture(Optional(), (), {"x": x, "mask": mask}))
    torch.testing.assert_close(staged(mask=mask, x=x), staged(x=x, mask=mask))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "lacks the tensor mask"),
        ({"mask": None}, "lacks the tensor mask"),
        ({"mask": torch.zeros(4, 8) > 0, "other": torch.zeros(4)}, "holds the tensor other"),
        ({"mask": torch.zeros(4, 8) > 0, "scale": 2.0}, "scale is 2.0 in a batch"),
        ({"mask": torch.zeros(4, 7) > 0}, r"axis 1 of batch input .* is 7"),
    ],
    ids=["missing", "none", "unknown", "another constant", "another size"],
)
def test_a_batch_unlike_the_captured_one_is_refused(kwargs: dict[str, Any], message: str) -> None:
    captured = capture(Optional(), sequences(4), {"mask": torch.zeros(4, 8) > 0})
    with pytest.raises(InvalidInput, match=message):
        captured.graph.bind(
            {n: tuple(t.shape) for n, t in captured.inputs.feed(sequences(4), kwargs).items()}
        )


def branching(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) * 2 if x.shape[0] > 5 else layer(x)


def test_a_branch_on_the_shape_becomes_a_condition() -> None:
    captured = capture(Applied(branching, layer=linear()), sequences(4))
    staged = StagedRun(captured)
    assert staged(torch.zeros(5, 8)).shape == (5, 8)
    with pytest.raises(InvalidInput, match=r"axis 0 of .* is 6"):
        staged(torch.zeros(6, 8))


def test_batch_norm_needs_two_values() -> None:
    captured = capture(nn.Sequential(linear(), nn.BatchNorm1d(8)), sequences(4))
    (rows,) = captured.graph.symbols
    captured.check({rows: 2})
    with pytest.raises(InvalidInput):
        captured.check({rows: 1})


def data_branch(layer: nn.Module, x: Tensor) -> Tensor:
    if x.sum() > 0:  # the line that is named
        return layer(x)
    return x


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def straight_through(layer: nn.Module, x: Tensor) -> Any:
    return Sign.apply(layer(x))  # the call that is named


class ChosenRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x[:, 0] > 0]  # the selection that is named


@pytest.mark.parametrize(
    ("model", "operator", "line"),
    [
        (Applied(data_branch, layer=linear()), "aten.gt.Scalar", "# the line that is named"),
        (Applied(straight_through, layer=linear()), "Sign", "# the call that is named"),
        (ChosenRows(), "aten.index.Tensor", "# the selection that is named"),
    ],
)
def test_what_cannot_be_captured_is_named(model: nn.Module, operator: str, line: str) -> None:
    with pytest.raises(CaptureFailed) as caught:
        capture(model, sequences(4))
    assert caught.value.operator == operator
    assert caught.value.source is not None
    assert caught.value.source.endswith(f"{HERE}:{line_of(line)}")
    assert "\n" not in str(caught.value)


def test_a_failed_capture_prints_nothing_and_leaves_the_model_alone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Assigning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level: Tensor
            self.register_buffer("level", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.level = x.mean()
            return x if x.sum() > 0 else -x

    model = Assigning()
    level = model.level
    with pytest.raises(CaptureFailed):
        capture(model, sequences(4))
    assert model.level is level
    assert capfd.readouterr() == ("", "")


def test_parameters_that_share_memory_are_refused() -> None:
    model = nn.Sequential(linear(), linear())
    shared = model[0].weight
    assert isinstance(shared, nn.Parameter)
    model[1].weight = nn.Parameter(shared.data)
    with pytest.raises(CaptureFailed, match=r"0\.weight and 1\.weight share memory"):
        capture(model, sequences(4))


def test_a_parameter_changed_by_the_forward_is_refused() -> None:
    def decaying(layer: nn.Module, x: Tensor) -> Any:
        with torch.no_grad():
            next(layer.parameters()).mul_(0.9)
        return layer(x)

    with pytest.raises(CaptureFailed, match="changes"):
        capture(Applied(decaying, layer=linear()), sequences(4))


def test_an_output_without_a_tensor_is_refused() -> None:
    with pytest.raises(CaptureFailed, match="no tensor"):
        capture(Applied(lambda layer, x: 3, layer=linear()), sequences(4))
