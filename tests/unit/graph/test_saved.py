from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from forescale.graph.capture import capture
from forescale.graph.json_format import from_json, to_json
from forescale.graph.model import ModelGraph
from forescale.graph.saved import measure_saved
from forescale.graph.size import compile_sizes, evaluate
from models import GPT, ResNet, UNet

Batch = Callable[[int, int], torch.Tensor]


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length))


def images(rows: int, side: int) -> torch.Tensor:
    return torch.rand(rows, 3, side, side)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
    "transformer": (lambda: GPT(blocks=2, tied=True), ids),
    "with dropout": (lambda: GPT(blocks=1, dropout=0.1), ids),
    "residual": (ResNet, images),
    "U-Net": (UNet, images),
    "interpolating": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.SiLU()),
        images,
    ),
}


@cache
def measured(name: str) -> tuple[nn.Module, ModelGraph, ModelGraph]:
    """The model, its graph as captured, and with memory recorded."""
    make, batch = NETWORKS[name]
    model = make()
    graph = capture(model, (batch(2, 16),)).graph
    return model, graph, measure_saved(graph)


def saved_bytes(graph: ModelGraph, binding: dict[str, int]) -> dict[str, int]:
    return {s.name: evaluate(s.size_bytes, binding) for s in graph.saved}


def kept_by_autograd(model: nn.Module, batch: torch.Tensor) -> int:
    """Bytes that the plain model keeps for its backward, parameters and buffers not counted."""
    state = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in state:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(batch)
    assert output.requires_grad
    return sum(kept.values())


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)).view(-1, 8) + 1.0)


def test_names_storages_after_the_tensors_that_own_them() -> None:
    graph = measure_saved(capture(Chain(), (torch.rand(3, 4),)).graph)
    (rows,) = graph.symbols
    by_target = {o.target.split(".")[1]: o for o in graph.operators}
    first, tanh, add = graph.operators[0], by_target["tanh"], by_target["add"]
    found = {s.name: (s.operators, evaluate(s.size_bytes, {rows: 10})) for s in graph.saved}
    assert found == {
        graph.inputs[0]: ((first.index,), 10 * 4 * 4),  # for the gradient of its weight
        tanh.outputs[0]: ((tanh.index,), 10 * 8 * 4),
        add.outputs[0]: ((graph.operators[-1].index,), 10 * 8 * 4),
    }


def test_nothing_is_kept_for_frozen_parameters() -> None:
    model = Chain()
    model.first.requires_grad_(requires_grad=False)
    graph = measure_saved(capture(model, (torch.rand(3, 4),)).graph)
    assert [s.operators for s in graph.saved] == [(graph.operators[-1].index,)]


def test_memory_without_a_tensor_is_named_after_its_operator() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    graph = measure_saved(capture(Norm(), (torch.rand(5, 6),)).graph)
    (operator,) = graph.operators
    (rows,) = graph.symbols
    statistics = {
        s.name: evaluate(s.size_bytes, {rows: 7}) for s in graph.saved if s.name not in graph.inputs
    }
    assert statistics == {f"{operator.name}#0": 7 * 4, f"{operator.name}#1": 7 * 4}


@pytest.mark.parametrize("name", [n for n in NETWORKS if "dropout" not in n])
def test_keeps_as_much_as_the_plain_model_at_sizes_never_seen(name: str) -> None:
    model, _, graph = measured(name)
    batch = NETWORKS[name][1]
    for rows, length in ((2, 16), (5, 16), (3, 24)):
        asked = batch(rows, length)
        binding = graph.bind({graph.inputs[0]: tuple(asked.shape)})
        # Small tensors that the graph computes out of place (positions, counters) are all that may differ.
        assert sum(saved_bytes(graph, binding).values()) == pytest.approx(
            kept_by_autograd(model, asked), rel=0.002
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_all_memory_is_given_back_and_the_graph_survives_json(name: str) -> None:
    _, _, graph = measured(name)
    begun: set[str] = set()
    for event in graph.memory:
        assert event.begins == (event.storage not in begun)
        begun ^= {event.storage}
    assert not begun
    assert from_json(to_json(graph)) == graph


@pytest.mark.parametrize("name", ["transformer", "U-Net", "interpolating"])
def test_passes_of_fixed_sizes_tell_the_same_as_symbols(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph, symbolic = measured(name)
    batch = NETWORKS[name][1]
    monkeypatch.setattr("forescale.graph.storages.SymbolicShapes.general", False)
    compared = measure_saved(graph)
    assert [(e.operator, e.backward, e.begins) for e in compared.memory] == [
        (e.operator, e.backward, e.begins) for e in symbolic.memory
    ]
    for rows, length in ((2, 16), (7, 16), (3, 32)):
        binding = graph.bind({graph.inputs[0]: tuple(batch(rows, length).shape)})
        sizes = [
            compile_sizes([e.size_bytes for e in g.memory], tuple(g.symbols))(binding)
            for g in (symbolic, compared)
        ]
        assert sizes[1] == sizes[0]


def test_a_module_that_cannot_be_looked_into_is_run_for_real() -> None:
    class Secretive(nn.Module):
        """Its control flow depends on values, which neither symbols nor fake tensors have."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.sum()) >= 0 else x

    graph = capture(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (torch.rand(3, 4),)).graph
    operators = (graph.operators[0], replace(graph.operators[1], target="module:1"))
    module = nn.Sequential(Secretive(), nn.Tanh())
    measured = measure_saved(replace(graph, operators=operators), {"module:1": module})
    (rows,) = graph.symbols
    kept = [evaluate(s.size_bytes, {rows: 10}) for s in measured.saved if s.operators == (1,)]
    assert kept == [10 * 4 * 4]


def test_attention_keeps_no_scores_unless_it_must() -> None:
    class Attend(nn.Module):
        def __init__(self, dropout: float) -> None:
            super().__init__()
            self.dropout = dropout
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * self.weight
            return F.scaled_dot_product_attention(y, y, y, dropout_p=self.dropout, is_causal=True)

    def grows_with(dropout: float) -> float:
        graph = measure_saved(capture(Attend(dropout), (torch.rand(2, 3, 16, 8),)).graph)
        totals = [
            sum(saved_bytes(graph, graph.bind({graph.inputs[0]: (2, 3, length, 8)})).values())
            for length in (64, 128)
        ]
        return totals[1] / totals[0]

    assert grows_with(0.0) == pytest.approx(2)
    assert grows_with(0.1) > 3
