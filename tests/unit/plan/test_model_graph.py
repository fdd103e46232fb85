"""The reader of captured models for placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from forescale.core.errors import InvalidInput
from forescale.graph.json_format import to_json
from forescale.graph.model import (
    Buffer,
    BufferUpdate,
    ModelGraph,
    Operator,
    Parameter,
    SavedStorage,
    SymbolSource,
    Tensor,
)
from forescale.plan.cluster_file import ClusterFile, read_cluster
from forescale.plan.placement.devices import TRAINING_STATE
from forescale.plan.placement.model_graph import read_model_graph
from forescale.plan.placement.problem import PlacementProblem
from forescale.profile.hardware import DISPATCH_S

NO_PROFILES = "[devices]\n[links]\n"
TWO = """
[devices.matrix]
count = 1
memory_bytes = 1e9
flops_per_s = 1e6
half_flops_per_s = 4e6
memory_bandwidth_bytes_per_s = 1e30

[devices.stream]
count = 1
memory_bytes = 1e9
flops_per_s = 1e30
memory_bandwidth_bytes_per_s = 1e6

[links.wire]
bandwidth_bytes_per_s = 1e6
latency_s = 0.001

[[topology]]
name = "all"
link = "wire"
"""


def cluster(text: str = TWO) -> ClusterFile:
    return read_cluster(text, profiles=NO_PROFILES)


def operator(index: int, name: str, source: str, **changes: Any) -> Operator:
    plain: dict[str, Any] = {
        "index": index,
        "name": name,
        "target": "aten.relu.default",
        "args": ({"tensor": source},),
        "kwargs": {},
        "outputs": (name,),
        "returns_tuple": False,
        "module_path": "",
        "source": "",
        "random": False,
        "inputs": (source,),
        "parameters": (),
        "buffers": (),
        "mutated_buffers": (),
    }
    return Operator(**{**plain, **changes})


def linear(index: int, name: str, source: str, parameter: str) -> Operator:
    return operator(
        index,
        name,
        source,
        target="aten.linear.default",
        args=({"tensor": source}, {"parameter": parameter}),
        parameters=(parameter,),
    )


def tensor(name: str, producer: int | None, consumers: Sequence[int], dtype: str = "float32") -> Tensor:
    return Tensor(
        name=name,
        producer=producer,
        consumers=tuple(consumers),
        shape=("s0", 8),
        dtype=dtype,
        requires_grad=producer is not None,
    )


def model(**changes: Any) -> ModelGraph:
    """linear, relu, linear on a batch of s0 rows of 8 numbers; weights of 8 × 8."""
    plain: dict[str, Any] = {
        "operators": (linear(0, "h", "x", "u"), operator(1, "r", "h"), linear(2, "y", "r", "v")),
        "tensors": {
            t.name: t
            for t in (tensor("x", None, [0]), tensor("h", 0, [1]), tensor("r", 1, [2]), tensor("y", 2, []))
        },
        "parameters": {
            name: Parameter(name=name, aliases=(), shape=(8, 8), dtype="float32", trainable=True)
            for name in ("u", "v")
        },
        "buffers": {},
        "buffer_updates": (),
        "inputs": ("x",),
        "outputs": ("y",),
        "symbols": {"s0": SymbolSource(tensor="x", axis=0)},
        "example": {"s0": 4},
    }
    return ModelGraph(**{**plain, **changes})


def read(graph: ModelGraph, **batch: int) -> PlacementProblem:
    return read_model_graph(to_json(graph), cluster(), batch=batch)


def test_work_is_a_roofline_of_the_training_step() -> None:
    problem = read(model())
    assert problem.nodes == ("h", "r", "y")
    assert problem.devices == ("matrix0", "stream0")
    product = 2 * 4 * 8 * 8
    started_ms = 2 * DISPATCH_S * 1e3
    # x needs no gradient, so the first product's backward is one product, the last one's two.
    assert problem.work_KN[0] == pytest.approx(
        [2 * product / 1e3 + started_ms, 2 * 32 / 1e3 + started_ms, 3 * product / 1e3 + started_ms]
    )
    result = 4 * 4 * 8
    assert problem.work_KN[1, 1] == pytest.approx((2 * result + 3 * result) / 1e3 + started_ms)


def test_tensors_travel_there_and_their_gradients_back() -> None:
    problem = read(model())
    once_ms = 1 + 4 * 4 * 8 / 1e3
    assert [net.nodes for net in problem.nets] == [(0, 1), (1, 2)]
    assert [net.cost for net in problem.nets] == pytest.approx([2 * once_ms, 2 * once_ms])
    frozen = {name: replace(t, requires_grad=False) for name, t in model().tensors.items()}
    assert read(model(tensors=frozen)).nets[0].cost == pytest.approx(once_ms)


def test_the_batch_scales_what_depends_on_it() -> None:
    usual, double = read(model()), read(model(), s0=8)
    assert double.work_KN[0, 0] - usual.work_KN[0, 0] == pytest.approx(2 * 2 * 4 * 8 * 8 / 1e3)
    assert double.memory_bytes_N[1] == 2 * usual.memory_bytes_N[1]


def test_half_precision_runs_at_its_own_rate() -> None:
    half = {name: replace(t, dtype="bfloat16") for name, t in model().tensors.items()}
    started_ms = 2 * DISPATCH_S * 1e3
    usual, quick = read(model()).work_KN[0, 0], read(model(tensors=half)).work_KN[0, 0]
    assert quick - started_ms == pytest.approx((usual - started_ms) / 4)


def test_memory_is_state_and_what_the_backward_needs() -> None:
    state, result = TRAINING_STATE * 4 * 64, 4 * 4 * 8
    assert read(model()).memory_bytes_N.tolist() == [state + result, result, state + result]
    saved = (SavedStorage(name="h", operators=(1, 2), size_bytes="s0*100"),)
    assert read(model(saved=saved)).memory_bytes_N.tolist() == [state, 400, state]
    frozen = {name: replace(p, trainable=False) for name, p in model().parameters.items()}
    assert read(model(parameters=frozen, saved=saved)).memory_bytes_N.tolist() == [256, 400, 256]


def test_two_readers_of_one_parameter_have_copies_whose_gradients_are_summed() -> None:
    parameter = model().parameters["u"]
    graph = model(
        operators=(linear(0, "h", "x", "u"), operator(1, "r", "h"), linear(2, "y", "r", "u")),
        parameters={"u": parameter},
    )
    problem = read(graph)
    assert problem.together == ()
    assert problem.memory_bytes_N.tolist() == read(model()).memory_bytes_N.tolist()
    assert problem.nets[-1].nodes == (0, 2)
    assert problem.nets[-1].cost == pytest.approx(2 * (1 + 4 * 64 / 1e3))
    frozen = replace(graph, parameters={"u": replace(parameter, trainable=False)})
    assert [net.nodes for net in read(frozen).nets] == [(0, 1), (1, 2)]


def test_more_readers_of_one_parameter_stay_together_and_hold_it_once() -> None:
    graph = model(
        operators=(linear(0, "h", "x", "u"), linear(1, "r", "h", "u"), linear(2, "y", "r", "u")),
        parameters={"u": model().parameters["u"]},
    )
    problem = read(graph)
    assert problem.together == ((0, 1, 2),)
    assert problem.memory_bytes_N[2] == 4 * 4 * 8
    assert len(problem.nets) == 2


def test_what_changes_a_buffer_stays_with_its_readers() -> None:
    usual = model()
    reader = replace(
        usual.operators[1],
        target="aten.add.Tensor",
        args=({"tensor": "h"}, {"buffer": "b"}),
        buffers=("b",),
    )
    graph = model(
        operators=(usual.operators[0], reader, usual.operators[2]),
        buffers={"b": Buffer(name="b", aliases=(), shape=(8,), dtype="float32", persistent=True)},
        buffer_updates=(BufferUpdate(buffer="b", tensor="y"),),
    )
    problem = read(graph)
    assert problem.together == ((1, 2),)
    assert problem.memory_bytes_N[1] == 4 * 4 * 8 + 4 * 8


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"rows": 3}, r"no symbol rows; it has s0 \(axis 0 of x\)"),
        ({"s0": 0}, "s0 is 0; it must be at least 1"),
        ({"s0": 65}, "not right for this batch: 64 - s0 must not be negative"),
    ],
)
def test_a_wrong_batch_is_refused(batch: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read(model(conditions=("64 - s0",)), **batch)


def test_a_group_without_rates_is_refused() -> None:
    bare = cluster("[devices.box]\ncount = 1\nmemory_bytes = 1e9\n")
    with pytest.raises(InvalidInput, match=r"devices\.box needs a profile, or flops_per_s"):
        read_model_graph(to_json(model()), bare, batch={})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the graph is not JSON"),
        (to_json(model())[:-50], "the graph is not JSON"),
        (to_json(model(operators=(), tensors={}, inputs=(), outputs=(), symbols={}, example={})), "no nodes"),
        (to_json(model()).replace('"index":2', '"index":1'), "has index 1 at position 2"),
        (to_json(model()).replace('"name":"r","target"', '"name":"h","target"'), "the same name"),
        (to_json(model()).replace('"s0"', '"s9"', 1), "the unknown symbol 's9'"),
        (to_json(model()).replace('"s0":4', '"s0":NaN'), "NaN is no JSON number"),
    ],
)
def test_a_wrong_graph_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_model_graph(text, cluster(), batch={})
