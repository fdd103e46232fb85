from __future__ import annotations

from dataclasses import replace

import pytest

from forescale.core.cluster import Link
from forescale.core.errors import InfeasiblePlan
from forescale.plan.drawing import draw_svg
from forescale.plan.evaluation import Pricing
from forescale.plan.partition import partition, predict
from forescale.plan.partition_plan import PartitionPlan, Schedule, Shard, Stage, replica_groups, replicas
from forescale.plan.schedule import Layout
from forescale.plan.teams import make_teams, team_problem
from forescale.plan.wording import spell_microbatches, spell_places
from forescale.plan.workload import tabulate
from unit.plan.perceptrons import perceptron, perceptron_problem

QUICK = Link(bandwidth_bytes_per_s=1e9, latency_s=1e-6)
SLOW = Link(bandwidth_bytes_per_s=1e6, latency_s=0.1)
GRAPH = perceptron(32, 256, 32, 256, 32)
OPERATORS = tuple(range(len(GRAPH.operators)))


def weights(plan: PartitionPlan) -> list[tuple[int, ...] | None]:
    return [stage.shard.weights if stage.shard else None for stage in plan.stages]


def test_one_row_per_batch_is_split_between_devices() -> None:
    request = perceptron_problem(GRAPH, rows=1, flops_per_s=1e6, link=QUICK)
    plan = partition(request)
    assert weights(plan) == [(1, 1), (1, 1)]
    assert all(stage.operators == OPERATORS for stage in plan.stages)
    alone = partition(request, max_shards=1)
    assert weights(alone) == [None]
    assert plan.prediction.step_s < 0.6 * alone.prediction.step_s


def test_slow_links_and_optimizers_that_need_whole_parameters_keep_operators_whole() -> None:
    slow = perceptron_problem(GRAPH, rows=1, flops_per_s=1e6, link=SLOW)
    assert weights(partition(slow)) == [None]
    whole = perceptron_problem(GRAPH, rows=1, flops_per_s=1e6, link=QUICK, shardable=False)
    assert weights(partition(whole)) == [None]


def test_unequal_devices_get_unequal_shards() -> None:
    plan = partition(perceptron_problem(GRAPH, rows=1, flops_per_s=1e6, link=QUICK, speeds=(1.0, 0.4)))
    first, last = plan.prediction.stages
    assert [stage.device for stage in plan.stages] == ["cpu0", "cpu1"]
    assert first.forward_s == pytest.approx(last.forward_s, rel=0.05)
    assert first.memory_bytes > 1.5 * last.memory_bytes


def test_a_model_too_large_for_any_device_is_split() -> None:
    graph = perceptron(64, 4096, 64, 8)  # one stage would hold a whole layer
    least_bytes = (
        partition(perceptron_problem(graph), max_shards=1, max_stages=1).prediction.stages[0].memory_bytes
    )
    tight = perceptron_problem(graph, speeds=(1.0,) * 4, memory_bytes=int(0.4 * least_bytes), flops_per_s=1e6)
    with pytest.raises(InfeasiblePlan):
        partition(tight, max_shards=1)
    plan = partition(tight)
    assert weights(plan) == [(1, 1, 1, 1)] * 4
    assert all(p.memory_bytes <= 0.4 * least_bytes for p in plan.prediction.stages)


def test_teams_share_microbatches_like_devices() -> None:
    request = perceptron_problem(GRAPH, rows=2, counts=(1, 2), speeds=(1.0,) * 4, flops_per_s=1e6, link=QUICK)
    plan = partition(request)
    (group,) = replica_groups(plan.stages)
    assert [[s.device for s in team] for team in replicas(group)] == [["cpu0", "cpu1"], ["cpu2", "cpu3"]]
    assert weights(plan) == [(1, 1)] * 4
    assert spell_places(plan) == "2 replicas on cpu0 + cpu1, cpu2 + cpu3"
    assert spell_microbatches(plan) == "1 + 1"


def test_three_devices_are_a_pair_and_one_alone_where_that_fits_best() -> None:
    plan = partition(perceptron_problem(GRAPH, rows=1, speeds=(1.0, 1.0, 1e-3), flops_per_s=1e6, link=QUICK))
    assert [stage.device for stage in plan.stages] == ["cpu0", "cpu1"]
    assert weights(plan) == [(1, 1), (1, 1)]


def test_what_is_predicted_is_what_the_plan_says() -> None:
    request = perceptron_problem(GRAPH, rows=4, counts=(1, 2), speeds=(1.0, 0.5), flops_per_s=1e6, link=QUICK)
    plan = partition(request)
    assert predict(request, plan.stages, plan.microbatches, plan.schedule) == plan.prediction


def test_a_team_has_room_for_as_much_as_its_devices() -> None:
    request = perceptron_problem(GRAPH, speeds=(1.0, 1.0, 1.0), memory_bytes=10**6)
    workload = tabulate(request)
    (teams,) = make_teams(workload, (0, 1, 2), 2)
    pair, alone = team_problem(workload, Pricing.of(request), teams).cluster.devices
    assert pair.memory_bytes == pytest.approx(2 * 10**6, rel=0.05)
    assert alone.memory_bytes == 10**6


def test_shards_count_once_for_what_is_in_flight() -> None:
    pair = [Stage(device=f"cpu{k}", operators=(0,), shard=Shard(index=k, weights=(1, 1))) for k in (0, 1)]
    stages = [Stage(device="cpu3", operators=(1,)), Stage(device="cpu4", operators=(2,))]
    layout = Layout.of([*pair, *stages], 8)
    assert [layout.in_flight(Schedule.ONE_F_ONE_B, stage) for stage in range(4)] == [3, 3, 2, 1]
    layout = Layout.of([stages[0], *pair], 8)
    assert [layout.in_flight(Schedule.ONE_F_ONE_B, stage) for stage in range(3)] == [2, 1, 1]


def test_shards_wait_for_the_slowest() -> None:
    request = perceptron_problem(GRAPH, rows=1, speeds=(1.0, 0.5), flops_per_s=1e6, link=QUICK)
    stages = [
        Stage(device=f"cpu{k}", operators=OPERATORS, shard=Shard(index=k, weights=(1, 1))) for k in (0, 1)
    ]
    prediction = predict(request, stages, 1, Schedule.ONE_F_ONE_B)
    quick, slow = prediction.stages
    assert slow.forward_s == pytest.approx(2 * quick.forward_s)
    assert slow.busy_s == pytest.approx(2 * quick.busy_s)
    assert prediction.step_s == pytest.approx(slow.busy_s + slow.transfer_s)


def test_what_shards_cannot_share_speaks_against_them() -> None:
    steps_s = [
        partition(perceptron_problem(GRAPH, rows=1, flops_per_s=1e6, link=QUICK, unsplit=u)).prediction.step_s
        for u in (None, 0.0, 0.5)
    ]
    assert steps_s[0] == pytest.approx(steps_s[1])
    assert steps_s[2] > 1.1 * steps_s[1]


def test_shards_with_a_device_that_others_use_wait_for_it_each_time() -> None:
    def step_s(delay_s: float) -> float:
        request = perceptron_problem(
            GRAPH, rows=1, speeds=(1.0, 0.5), flops_per_s=1e6, link=QUICK, delay_s=delay_s
        )
        stages = [
            Stage(device=f"cpu{k}", operators=OPERATORS, shard=Shard(index=k, weights=(1, 1))) for k in (0, 1)
        ]
        return predict(request, stages, 1, Schedule.ONE_F_ONE_B).step_s

    exchanges = 3  # two pairs of layers ahead, one back: nobody asks for the gradient of the inputs
    assert step_s(0.01) - step_s(0.0) == pytest.approx(exchanges * 0.005)


def test_the_rationale_and_the_picture_name_the_shards() -> None:
    request = perceptron_problem(GRAPH, rows=1, flops_per_s=1e6, link=QUICK)
    plan = partition(request)
    sentence = next(s for s in plan.rationale if "between them" in s)
    assert "cpu0 + cpu1 split 6 of 7 operators between them, 1 : 1" in sentence
    assert "50% + 50%" in sentence
    assert "shard 2 of 2" in draw_svg(GRAPH, plan)
    other = partition(replace(request, cluster=replace(request.cluster, default_link=SLOW)))
    assert not any("between them" in s for s in other.rationale)
