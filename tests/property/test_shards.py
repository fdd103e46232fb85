"""Plans with shards against the plainest computation of the same thing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.core.cluster import Link
from forescale.plan.partition import partition, predict
from forescale.plan.partition_plan import Schedule, Shard, Stage
from forescale.plan.problem import PartitionProblem
from forescale.plan.schedule import Phase
from unit.plan.perceptrons import perceptron, perceptron_problem
from unit.plan.sharded_reference import ShardedSplit

widths = st.lists(st.integers(4, 60), min_size=3, max_size=5)


@st.composite
def problems(draw, *, devices: int) -> PartitionProblem:
    link = Link(
        bandwidth_bytes_per_s=draw(st.sampled_from([1e5, 1e7, 1e9])),
        latency_s=draw(st.sampled_from([1e-6, 1e-3])),
        occupies_device=draw(st.booleans()),
    )
    links = {}
    if draw(st.booleans()):
        links = {("cpu0", "cpu1"): replace(link, occupies_device=not link.occupies_device)}
    return perceptron_problem(
        perceptron(*draw(widths)),
        speeds=[draw(st.sampled_from([1.0, 0.5, 0.8])) for _ in range(devices)],
        counts=draw(st.sampled_from([(1,), (1, 2), (2, 4)])),
        flops_per_s=draw(st.sampled_from([1e6, 1e8])),
        link=link,
        links=links,
        delay_s=draw(st.sampled_from([0.0, 1e-2])),
        unsplit=draw(st.sampled_from([None, 0.3, 1.0])),
        optimizer_s_per_byte=draw(st.sampled_from([0.0, 1e-5])),
        loss_s=draw(st.sampled_from([0.0, 1e-3])),
    )


def shards(devices: list[str], weights: tuple[int, ...], operators: tuple[int, ...], **more) -> list[Stage]:
    return [
        Stage(device=device, operators=operators, shard=Shard(index=index, weights=weights), **more)
        for index, device in enumerate(devices)
    ]


@st.composite
def ways(draw, request: PartitionProblem) -> list[Stage]:
    """Shards of the whole model, replicas of shards, and pipelines that begin or end with shards."""
    names = draw(st.permutations([device.name for device in request.cluster.devices]))
    operators = tuple(range(len(request.graph.operators)))
    weights = draw(st.sampled_from([(1, 1), (3, 1), (7, 3)]))
    kind = draw(st.sampled_from(["whole", "three", "replicas", "first", "last", "both"]))
    middle = draw(st.integers(1, len(operators) - 1))
    first, last = operators[:middle], operators[middle:]
    again = draw(st.booleans())
    match kind:
        case "whole":
            return shards(names[:2], weights, operators, recompute=again)
        case "three":
            return shards(names[:3], (2, 1, 1), operators)
        case "replicas":
            return shards(names[:2], weights, operators) + shards(names[2:4], weights, operators)
        case "first":
            return [
                *shards(names[:2], weights, first),
                Stage(device=names[2], operators=last, recompute=again),
            ]
        case "last":
            return [
                Stage(device=names[2], operators=first),
                *shards(names[:2], weights, last, recompute=again),
            ]
        case _:
            return shards(names[:2], weights, first) + shards(names[2:4], weights, last, recompute=again)


@settings(max_examples=60)
@given(st.data())
def test_prediction_equals_the_plain_simulation(data) -> None:
    request = data.draw(problems(devices=4))
    stages = data.draw(ways(request))
    count = data.draw(st.sampled_from(sorted(request.costs)))
    schedule = data.draw(st.sampled_from([Schedule.ONE_F_ONE_B, Schedule.EAGER_1F1B, Schedule.GPIPE]))
    prediction = predict(request, stages, count, schedule)
    reference = ShardedSplit(problem=request, stages=stages, count=count, schedule=schedule)
    assert prediction.step_s == pytest.approx(reference.step_s())
    for stage, predicted in enumerate(prediction.stages):
        assert predicted.memory_bytes == pytest.approx(reference.memory_bytes(stage), abs=1)
        if len({planned.operators for planned in stages}) > 1:
            assert predicted.transfer_s == pytest.approx(reference.transfer_s(stage))
        assert predicted.forward_s == pytest.approx(reference.own_s(stage, Phase.FORWARD))


@settings(max_examples=20)
@given(problems(devices=2))
def test_shards_are_as_good_as_any_weights(request: PartitionProblem) -> None:
    operators = tuple(range(len(request.graph.operators)))
    names = [device.name for device in request.cluster.devices]
    alternatives = [
        predict(request, shards(names, (a, 24 - a), operators), count, Schedule.ONE_F_ONE_B).step_s
        for a in (1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 21, 23)
        for count in request.costs
    ]
    whole = partition(request, max_shards=1)
    best_s = min(*alternatives, whole.prediction.step_s)
    plan = partition(request)
    assert plan.prediction.step_s <= best_s * 1.06  # what gains less than 3 % is not split
    again = predict(request, plan.stages, plan.microbatches, plan.schedule)
    assert again.step_s == pytest.approx(plan.prediction.step_s)
