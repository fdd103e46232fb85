"""What decisions say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chain_model import ChainCosts, batch, chain_graph
from forescale.control.choice import Choice, changes, shape
from forescale.control.planner import Planner
from forescale.graph.model import Tensor
from forescale.plan.partition_plan import PartitionPlan, Schedule, Stage
from simulated_training import train


@pytest.fixture(scope="module")
def plan() -> PartitionPlan:
    found = Planner(ChainCosts()).best(batch(128), {})
    stages = tuple(Stage(device=f"cpu{i}", operators=tuple(range(12 * i, 12 * i + 12))) for i in range(2))
    return replace(found, stages=stages, microbatches=4, schedule=Schedule.ONE_F_ONE_B)


def sentence(before: PartitionPlan, after: PartitionPlan, *, moved_bytes: int, steps: int = 50) -> str:
    return Choice(
        before=before, plan=after, now_s=0.4, then_s=0.3, move_s=0.02, moved_bytes=moved_bytes
    ).sentence(steps)


def test_all_that_differs_is_named(plan: PartitionPlan) -> None:
    first, second = plan.stages
    after = replace(
        plan,
        stages=(
            replace(first, operators=tuple(range(10))),
            replace(second, operators=tuple(range(10, 24)), recompute=True),
        ),
        microbatches=8,
        schedule=Schedule.GPIPE,
    )
    assert changes(plan, after) == (
        "operators 12 + 12 → 10 + 14, microbatches 4 → 8, recomputing nothing → cpu1, schedule 1F1B → GPipe"
    )
    assert changes(plan, plan) == "no change"


def test_one_microbatch_has_no_schedule(plan: PartitionPlan) -> None:
    after = replace(plan, microbatches=1, schedule=Schedule.GPIPE)
    assert changes(plan, after) == "microbatches 4 → 1"


def test_a_device_that_is_left_out_is_named(plan: PartitionPlan) -> None:
    after = replace(plan, stages=(replace(plan.stages[0], operators=tuple(range(24))),))
    assert changes(plan, after) == "operators cpu0 12 + cpu1 12 → cpu0 24"


def replicas(plan: PartitionPlan, *shares: int) -> PartitionPlan:
    whole = tuple(range(24))
    stages = tuple(Stage(device=f"cpu{i}", operators=whole, share=share) for i, share in enumerate(shares))
    return replace(plan, stages=stages, microbatches=sum(shares))


def test_replicas_and_their_microbatches_are_named(plan: PartitionPlan) -> None:
    assert changes(plan, replicas(plan, 5, 3)) == (
        "operators 12 + 12 → 2 replicas of 24 on cpu0 and cpu1, microbatches 4 → 5 + 3"
    )
    assert changes(replicas(plan, 4, 4), replicas(plan, 5, 3)) == "microbatches 4 + 4 → 5 + 3"


def test_as_many_operators_but_others(plan: PartitionPlan) -> None:
    first, second = plan.stages
    after = replace(
        plan,
        stages=(
            replace(first, operators=(*range(11), 12)),
            replace(second, operators=(11, *range(13, 24))),
        ),
    )
    assert changes(plan, after) == "other operators, as many"


def test_a_change_that_moves_nothing_says_what_changes(plan: PartitionPlan) -> None:
    said = sentence(plan, replace(plan, microbatches=8), moved_bytes=0)
    assert said == (
        "microbatches 4 → 8: steps of 300 ms instead of 400 ms, which saves 5 s over 50 steps; "
        "it moves nothing and costs 20 ms"
    )


def test_one_step_is_one_step(plan: PartitionPlan) -> None:
    after = replace(plan, microbatches=8)
    assert "over 1 step; it moves 598 kB" in sentence(plan, after, moved_bytes=598_000, steps=1)


def test_shapes_are_those_of_the_batches_parts() -> None:
    graph = chain_graph()

    def part(name: str, *sizes: int | str) -> Tensor:
        return replace(graph.tensors["t0"], name=name, shape=sizes)

    parts = {
        "t0": part("t0", "rows", "length"),
        "mask": part("mask", "rows", "length"),
        "twice": part("twice", "2*rows"),
        "fixed": part("fixed", 7),
    }
    several = replace(graph, inputs=("t0", "mask", "twice", "fixed"), tensors={**graph.tensors, **parts})
    planner = Planner(ChainCosts(graph=several))
    assert shape(batch(128), planner) == "8 × 128 (t0, mask), 16 (twice)"
    fixed = replace(graph, tensors={**graph.tensors, "t0": part("t0", 7)})
    assert shape(batch(128), Planner(ChainCosts(graph=fixed))) == "fixed shape"


def test_no_reason_holds_a_symbol_or_a_wrong_plural() -> None:
    run = train(
        120,
        speeds=lambda step: {"cpu1": 0.4} if step >= 40 else {},
        lengths=lambda step: 512 if step >= 80 else 128,
    )
    assert len(run.decisions) >= 2
    for decision in run.decisions:
        assert "length=" not in decision.reason
        assert "over 1 steps" not in decision.reason
