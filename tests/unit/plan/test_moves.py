from __future__ import annotations

from dataclasses import replace

import pytest

from chain_model import GB, ChainCosts, batch, chain_graph
from forescale.core.cluster import Link
from forescale.graph.model import Buffer, BufferUpdate, ModelGraph, Parameter
from forescale.plan.extents import WHOLE, Extent
from forescale.plan.moves import Holding, Move, gradient_sums, held_by, holdings, move_bytes, move_s, moves
from forescale.plan.partition_plan import PartitionPlan, Prediction, Schedule, Shard, Stage

PARAMETER_BYTES = 256 * 256 * 4


def plan(*stages: tuple[str, range]) -> PartitionPlan:
    return PartitionPlan(
        stages=tuple(Stage(device=device, operators=tuple(operators)) for device, operators in stages),
        microbatches=1,
        schedule=Schedule.ONE_F_ONE_B,
        prediction=Prediction(step_s=1.0, stages=()),
    )


def tied_graph() -> ModelGraph:
    """Four operators; ``tied`` is read by the first and the last, ``mean`` updated by the third."""
    graph = chain_graph(4)
    operators = list(graph.operators)
    for i in (0, 3):
        operators[i] = replace(operators[i], parameters=("tied", *operators[i].parameters))
    extra = {
        name: Parameter(name=name, aliases=(), shape=(10,), dtype="float32", trainable=name == "tied")
        for name in ("tied", "unread")
    }
    mean = Buffer(name="mean", aliases=(), shape=(3,), dtype="float64", persistent=True)
    return replace(
        graph,
        operators=tuple(operators),
        parameters={**extra, **graph.parameters},
        buffers={"mean": mean},
        buffer_updates=(BufferUpdate(buffer="mean", tensor="t3"),),
    )


def test_holders_are_readers_in_pipeline_order() -> None:
    held = holdings(tied_graph(), plan(("b", range(2)), ("a", range(2, 4))))
    assert {name: tuple(h.device for h in holders) for name, holders in held.items()} == {
        "tied": ("b", "a"),
        "unread": ("b",),
        "p0": ("b",),
        "p1": ("b",),
        "p2": ("a",),
        "p3": ("a",),
        "mean": ("a",),
    }
    assert held_by(held, "a") == dict.fromkeys(("tied", "p2", "p3", "mean"), WHOLE)


def test_the_same_plan_moves_nothing() -> None:
    same = plan(("a", range(2)), ("b", range(2, 4)))
    assert moves(tied_graph(), same, same) == ()


def test_only_what_changes_hands_moves() -> None:
    before = plan(("a", range(2)), ("b", range(2, 4)))
    after = plan(("a", range(3)), ("b", range(3, 4)))
    assert moves(tied_graph(), before, after) == (
        Move(name="p2", source="b", target="a"),
        Move(name="mean", source="b", target="a"),
    )


def test_new_holder_of_a_tied_parameter_is_sent_the_owners_copy() -> None:
    before = plan(("a", range(2)), ("b", range(2, 4)))
    after = plan(("a", range(2)), ("b", range(2, 3)), ("c", range(3, 4)))
    assert moves(tied_graph(), before, after) == (
        Move(name="tied", source="a", target="c"),
        Move(name="p3", source="b", target="c"),
    )


def test_what_nobody_reads_follows_the_first_stage() -> None:
    before = plan(("a", range(2)), ("b", range(2, 4)))
    after = plan(("b", range(2)), ("a", range(2, 4)))
    assert Move(name="unread", source="a", target="b") in moves(tied_graph(), before, after)
    assert all(move.name != "tied" for move in moves(tied_graph(), before, after))


def test_bytes_count_optimizer_state_of_trainable_parameters_only() -> None:
    graph = tied_graph()
    before = plan(("a", range(4)))
    after = plan(("b", range(4)))
    trainable = 4 * PARAMETER_BYTES + 40
    assert move_bytes(graph, before, after, 2.0) == 3 * trainable + 40 + 24


def test_move_time_counts_each_link_once() -> None:
    problem = ChainCosts(devices=3).problem(batch(128), {})
    links = {("cpu0", "cpu1"): Link(bandwidth_bytes_per_s=GB, latency_s=0.5)}
    problem = replace(problem, cluster=replace(problem.cluster, links=links))
    before = plan(("cpu0", range(12)), ("cpu1", range(12, 24)))
    after = plan(("cpu0", range(10)), ("cpu1", range(10, 24)))
    assert move_s(problem, before, after) == pytest.approx(0.5 + 2 * 3 * PARAMETER_BYTES / GB)


def linears() -> ModelGraph:
    """Four operators that can be split: the first by its columns, the second by its rows, and so on."""
    graph = chain_graph(4)
    tensors = {n: replace(t, shape=("rows", "length", 256)) for n, t in graph.tensors.items()}
    return replace(graph, tensors=tensors)


def shards(graph: ModelGraph, weights: tuple[int, ...]) -> PartitionPlan:
    """All operators, split between devices a, b and so on."""
    whole = plan(("a", range(len(graph.operators))))
    return replace(
        whole,
        stages=tuple(
            replace(whole.stages[0], device=device, shard=Shard(index=index, weights=weights))
            for index, device in zip(range(len(weights)), "abc", strict=False)
        ),
    )


def test_shards_are_sent_their_parts() -> None:
    graph = linears()
    whole, split = plan(("a", range(4))), shards(graph, (3, 1))
    held = holdings(graph, split)
    assert set(held_by(held, "b").values()) == {Extent(((1, ((192, 256),)),)), Extent(((0, ((192, 256),)),))}
    changes = moves(graph, whole, split)
    assert {move.name: move.extent for move in changes} == held_by(held, "b")
    assert {(move.source, move.target) for move in changes} == {("a", "b")}
    assert move_bytes(graph, whole, split, 2.0) == 3 * PARAMETER_BYTES


def test_a_whole_is_put_together_from_shards() -> None:
    graph = linears()
    split, whole = shards(graph, (3, 1)), plan(("c", range(4)))
    changes = moves(graph, split, whole)
    assert [(m.name, m.source) for m in changes] == [(f"p{i}", device) for i in range(4) for device in "ab"]
    assert move_bytes(graph, split, whole, 2.0) == 3 * 4 * PARAMETER_BYTES


def test_only_the_difference_of_two_splits_is_sent() -> None:
    graph = linears()
    uneven, even = shards(graph, (3, 1)), shards(graph, (1, 1))
    changes = moves(graph, uneven, even)
    assert {(move.source, move.target) for move in changes} == {("a", "b")}
    assert {spans for move in changes for _, spans in move.extent.axes} == {((128, 192),)}
    assert {(move.source, move.target) for move in moves(graph, even, uneven)} == {("b", "a")}


def test_replicas_add_up_the_gradients_of_the_same_parts() -> None:
    graph = linears()
    one = shards(graph, (3, 1))
    other = tuple(replace(stage, device=device) for stage, device in zip(one.stages, "cd", strict=True))
    assert gradient_sums(holdings(graph, one)) == ()
    sums = gradient_sums(holdings(graph, replace(one, stages=(*one.stages, *other))))
    assert {one.devices for one in sums} == {("a", "c"), ("b", "d")}
    assert all(one.adding == one.devices and one.extent != WHOLE for one in sums)
    assert len(sums) == 2 * 4


def test_replicas_add_up_what_their_shards_hold_whole_shard_by_shard() -> None:
    held = [Holding(device=device, replica=i // 2) for i, device in enumerate("abcd")]
    sums = gradient_sums({"p": held})
    assert [(one.devices, one.adding) for one in sums] == [(("a", "c"),) * 2, (("b", "d"),) * 2]
