"""Costs against hand-counted numbers and against PyTorch's own counter where that counts right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from forescale.graph.capture import capture
from forescale.graph.cost import cost_table, operator_costs
from forescale.graph.model import ModelGraph, Operator, Parameter, SymbolSource, Tensor
from forescale.graph.size import evaluate


class Function(nn.Module):
    """A function of its inputs and of parameters of the given shapes."""

    def __init__(self, function: Any, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(torch.rand(shape)) for shape in shapes)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs, *self.weights)


def graph_of(model: nn.Module, *inputs: torch.Tensor) -> ModelGraph:
    return capture(model, inputs).graph


def binding_of(graph: ModelGraph, inputs: Sequence[torch.Tensor]) -> dict[str, int]:
    return graph.bind({name: tuple(x.shape) for name, x in zip(graph.inputs, inputs, strict=True)})


def flops(
    model: nn.Module, captured: Sequence[torch.Tensor], asked: Sequence[torch.Tensor]
) -> tuple[int, int]:
    """Forward and backward FLOPs at the shapes of ``asked`` of a graph captured at other shapes."""
    graph = graph_of(model, *captured)
    costs = cost_table(graph)(binding_of(graph, asked))
    return int(costs.forward_flops_O.sum()), int(costs.backward_flops_O.sum())


def counted(model: nn.Module, inputs: Sequence[torch.Tensor]) -> tuple[int, int]:
    """What PyTorch's counter sees."""
    with FlopCounterMode(display=False) as forward:
        output = model(*inputs)
    with FlopCounterMode(display=False) as backward:
        output.backward(torch.ones_like(output))
    return forward.get_total_flops(), backward.get_total_flops()


def images(rows: int, channels: int, *size: int) -> torch.Tensor:
    return torch.rand(rows, channels, *size)


CONTRACTIONS = {
    "linear": (nn.Linear(6, 5), (4, 3, 6), (7, 2, 6)),
    "two linears": (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)), (4, 6), (7, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 8), (3, 4, 11)),
    "conv2d": (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 8, 9), (5, 3, 13, 16)),
    "conv3d": (nn.Conv3d(2, 4, (1, 2, 3)), (2, 2, 4, 5, 6), (3, 2, 7, 6, 5)),
    "padding by name": (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 6, 7), (4, 3, 9, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (2, 4, 5, 6), (3, 4, 7, 8)),
    "matmul": (Function(lambda x, w: x @ w, (6, 5)), (3, 4, 6), (5, 2, 6)),
    "bmm": (Function(torch.bmm, (2, 6, 5)), (2, 4, 6), (2, 7, 6)),
    "addmm": (Function(lambda x, b, w: torch.addmm(b, x, w), (5,), (6, 5)), (4, 6), (7, 6)),
    "einsum": (
        Function(lambda x, w: torch.einsum("b i d, h d e -> b h i e", x, w), (3, 6, 5)),
        (2, 4, 6),
        (3, 7, 6),
    ),
    "three factors": (
        Function(lambda x, v, w: torch.einsum("bi,ij,jk->bk", x, v, w), (6, 5), (5, 4)),
        (3, 6),
        (7, 6),
    ),
}


@pytest.mark.parametrize(("model", "captured", "asked"), CONTRACTIONS.values(), ids=CONTRACTIONS)
@pytest.mark.parametrize("input_gradient", [False, True])
def test_agrees_with_pytorch_where_it_counts(
    model: nn.Module, captured: tuple[int, ...], asked: tuple[int, ...], input_gradient: bool
) -> None:
    # A factor in front makes the input need a gradient or not, and costs its elements.
    scale = nn.Parameter(torch.ones(()), requires_grad=input_gradient)
    factor = Function(lambda x, s: x * s, ())
    factor.weights[0] = scale
    scaled = nn.Sequential(factor, model)
    x = torch.rand(asked)
    forward, backward = flops(scaled, [torch.rand(captured)], [x])
    expected_forward, expected_backward = counted(scaled, [x])
    assert forward == expected_forward + x.numel()
    assert backward == expected_backward + (x.numel() if input_gradient else 0)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolution(groups: int) -> None:
    # PyTorch's counter counts the weight's gradient as if there were one group.
    forward, backward = flops(nn.Conv2d(4, 8, 3, groups=groups), [images(2, 4, 8, 9)], [images(3, 4, 12, 13)])
    assert forward == backward == 2 * 3 * 8 * 10 * 11 * (4 // groups) * 9


def attention(
    queries: int, keys: int | None = None, *, causal: bool, dropout: float = 0.0
) -> tuple[int, int]:
    """FLOPs for 2 rows, 3 heads of width 16; self-attention if ``keys`` is None."""

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, None, dropout, causal)

    if keys is None:
        model, lengths, captured = Function(lambda x, w: attend(x * w, x * w), (16,)), [queries], [40]
    else:
        model, lengths = Function(lambda q, k, w: attend(q * w, k * w), (16,)), [queries, keys]
        captured = [40, 50]
    graph = graph_of(model, *(torch.rand(2, 3, n, 16) for n in captured))
    binding = graph.bind({name: (2, 3, n, 16) for name, n in zip(graph.inputs, lengths, strict=True)})
    costs = cost_table(graph)(binding)
    (index,) = [o.index for o in graph.operators if "scaled_dot_product" in o.target]
    return int(costs.forward_flops_O[index]), int(costs.backward_flops_O[index])


ONE_PAIR = 2 * 2 * 3 * 16  # one query meets one key: 2 rows, 3 heads, width 16, 2 FLOPs


@pytest.mark.parametrize(
    ("tokens", "causal", "pairs"),
    [
        (100, False, 100 * 100),
        (100, True, 100 * 100),
        (512, True, 512 * 512),
        (1024, True, 512 * 512 + 512 * 1024),
        (1300, True, 512 * 512 + 512 * 1024 + 276 * 1300),
        (2048, True, 512 * (512 + 1024 + 1536 + 2048)),
        (2048, False, 2048 * 2048),
    ],
)
def test_fused_attention_skips_blocks_of_512_keys(tokens: int, causal: bool, pairs: int) -> None:
    forward, backward = attention(tokens, causal=causal)
    assert forward == 2 * ONE_PAIR * pairs
    assert backward == 5 * ONE_PAIR * pairs


def test_attention_with_dropout_is_not_fused() -> None:
    forward, backward = attention(1024, causal=True, dropout=0.1)
    assert forward == 2 * ONE_PAIR * 1024**2
    assert backward == 4 * ONE_PAIR * 1024**2


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "pairs"),
    [
        (100, 60, False, 100 * 60),
        (600, 2000, True, 512 * 512 + 88 * 1024),
        (2000, 600, True, 512 * 512 + 1488 * 600),
    ],
)
def test_cross_attention(queries: int, keys: int, causal: bool, pairs: int) -> None:
    assert attention(queries, keys, causal=causal)[0] == 2 * ONE_PAIR * pairs


def test_recurrent_layers() -> None:
    model = nn.LSTM(8, 16, num_layers=2, batch_first=True, bidirectional=True)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0]

    graph = graph_of(Last(), torch.rand(2, 5, 8))
    (operator,) = [o for o in graph.operators if "lstm" in o.target]
    cost = operator_costs(graph)[operator.index]
    binding = binding_of(graph, [torch.rand(3, 5, 8)])
    assert evaluate(cost.forward_flops, binding) == 2 * 15 * matrices
    assert evaluate(cost.backward_flops, binding) == 4 * 15 * matrices


def test_only_what_is_trained_has_a_backward() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for parameter in model[0].parameters():
        parameter.requires_grad = False
    graph = graph_of(model, torch.rand(3, 4))
    costs = cost_table(graph)(dict.fromkeys(graph.symbols, 5))
    assert costs.forward_flops_O.tolist() == [2 * 5 * 4 * 8, 5 * 8, 2 * 5 * 8 * 2]
    assert costs.backward_flops_O.tolist() == [0, 0, 2 * 5 * 8 * 2]
    assert costs.backward_bytes_O[:2].tolist() == [0, 0]
    assert costs.forward_bytes_O.tolist() == [
        4 * (5 * 4 + 4 * 8 + 8 + 5 * 8),
        4 * (5 * 8 * 2),
        4 * (5 * 8 + 8 * 2 + 2 + 5 * 2),
    ]


def test_elementwise_reductions_norms_and_views() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = (x * w).transpose(1, 2)  # 60, free
        y = F.layer_norm(y, (5,))  # 7 each
        y = torch.softmax(y, -1)  # 5 each
        y = F.max_pool1d(y, 2)  # 2 x 5 x 3 x 2 outputs of 2
        return y.sum()

    graph = graph_of(Function(function, (1,)), torch.rand(2, 6, 5).transpose(1, 2).contiguous())
    binding = binding_of(graph, [torch.rand(2, 5, 6)])
    costs = {o.target.split(".")[1]: c for o, c in zip(graph.operators, operator_costs(graph), strict=True)}
    forward = {name: evaluate(cost.forward_flops, binding) for name, cost in costs.items()}
    assert forward == {
        "mul": 60,
        "transpose": 0,
        "layer_norm": 420,
        "softmax": 300,
        "max_pool1d": 48,
        "sum": 24,
    }
    assert costs["transpose"].forward_bytes == costs["transpose"].backward_bytes == 0


def test_a_look_up_moves_rows_and_not_the_table() -> None:
    graph = graph_of(nn.Embedding(1000, 8), torch.randint(0, 9, (2, 3)))
    (cost,) = operator_costs(graph)
    binding = binding_of(graph, [torch.zeros(4, 5, dtype=torch.long)])
    assert evaluate(cost.forward_bytes, binding) == 20 * 8 + 2 * 20 * 8 * 4
    assert cost.forward_flops == 0
    assert evaluate(cost.backward_bytes, binding) >= 3 * 1000 * 8 * 4  # the gradient is dense


def whole_module() -> ModelGraph:
    tensors = {
        "x": Tensor(
            name="x",
            producer=None,
            consumers=(0,),
            shape=("s0", 3, "s1"),
            dtype="float32",
            requires_grad=True,
        ),
        "y": Tensor(
            name="y", producer=0, consumers=(), shape=("s0", 3, 7), dtype="float32", requires_grad=True
        ),
    }
    operator = Operator(
        index=0,
        name="encoder",
        target="module:encoder",
        args=({"tensor": "x"}, {"parameter": "encoder.w"}),
        kwargs={},
        outputs=("y",),
        returns_tuple=False,
        module_path="encoder",
        source="",
        random=False,
        inputs=("x",),
        parameters=("encoder.w",),
        buffers=(),
        mutated_buffers=(),
    )
    return ModelGraph(
        operators=(operator,),
        tensors=tensors,
        parameters={
            "encoder.w": Parameter(
                name="encoder.w", aliases=(), shape=(7, 11), dtype="float32", trainable=True
            )
        },
        buffers={},
        buffer_updates=(),
        inputs=("x",),
        outputs=("y",),
        symbols={"s0": SymbolSource(tensor="x", axis=0), "s1": SymbolSource(tensor="x", axis=2)},
        example={"s0": 2, "s1": 11},
    )


def test_a_whole_module_costs_its_parameters_per_row() -> None:
    graph = whole_module()
    costs = cost_table(graph)({"s0": 4, "s1": 11})
    assert costs.forward_flops_O == pytest.approx(2 * 4 * 3 * 77)
    assert costs.backward_flops_O == pytest.approx(2 * 2 * 4 * 3 * 77)
    assert costs.forward_bytes_O == pytest.approx(4 * (4 * 3 * 11 + 77 + 4 * 3 * 7))


def test_arrays_hold_one_entry_per_operator() -> None:
    graph = graph_of(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), torch.rand(3, 4))
    costs = cost_table(graph)(graph.example)
    assert costs.forward_flops_O.dtype == np.float64
    assert all(
        a.shape == (2,) for a in (costs.backward_flops_O, costs.forward_bytes_O, costs.backward_bytes_O)
    )
