from __future__ import annotations

from dataclasses import replace

import pytest

from chain_model import GB, ChainCosts, batch, chain_graph
from forescale.core.cluster import Link
from forescale.graph.model import Buffer, BufferUpdate, ModelGraph, Parameter
from forescale.plan.extents import WHOLE
from forescale.plan.moves import Move, held_by, holdings, move_bytes, move_s, moves
from forescale.plan.partition_plan import PartitionPlan, Prediction, Schedule, Stage

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
