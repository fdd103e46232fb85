"""The planner against the plainest computation of the same thing, on random small graphs."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from forescale.core.cluster import Link
from forescale.core.errors import InfeasiblePlan
from forescale.graph.model import ModelGraph
from forescale.plan.evaluation import Mode, Pricing, evaluate
from forescale.plan.line import Line, cut
from forescale.plan.order import gather_atoms, linear_orders
from forescale.plan.partition import partition, predict
from forescale.plan.partition_plan import Schedule, Stage, replica_groups
from forescale.plan.problem import PartitionProblem
from forescale.plan.replicas import changed_buffer, share_out
from forescale.plan.schedule import Layout
from forescale.plan.workload import tabulate
from unit.plan.graphs import GraphBuilder, problem
from unit.plan.reference import Split


def relaxed(examples: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, suppress_health_check=slow)


seconds = st.floats(0.0, 4.0).map(lambda value: round(value, 2))


@st.composite
def random_graphs(draw, *, least: int = 3, most: int = 6) -> ModelGraph:
    """Skips, branches, tied and frozen parameters, buffers that are updated, several outputs."""
    builder = GraphBuilder()
    count = draw(st.integers(least, most))
    names = ["x"]
    for name in ("shared", "own"):
        builder.parameter(name, draw(st.integers(1, 40)), trainable=draw(st.booleans()))
    builder.buffer("running", 4)
    for index in range(count):
        inputs = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        if index and "x" in inputs and draw(st.booleans()):
            inputs = [names[-1]]
        names.append(
            builder.add(
                f"op{index}",
                *inputs,
                elements=draw(st.integers(1, 64)),
                parameters=draw(st.lists(st.sampled_from(["shared", "own"]), max_size=1)),
                buffers=["running"] if draw(st.integers(0, 5)) == 0 else [],
                updates="running" if draw(st.integers(0, 7)) == 0 and not builder.updates else None,
                requires_grad=draw(st.integers(0, 4)) > 0,
                separable=draw(st.booleans()),
            )
        )
        for name in inputs:
            if name != "x" and name not in {s.name for s in builder.saved} and draw(st.booleans()):
                builder.save(name, index)
        if draw(st.booleans()):
            builder.save(f"op{index}#0", index)
    outputs = draw(st.lists(st.sampled_from(names[1:]), max_size=1))
    return builder.build(list(dict.fromkeys([names[-1], *outputs])), {"x": 16})


@st.composite
def problems(draw, *, devices: int, most: int = 6, memory: bool = False) -> PartitionProblem:
    graph = draw(random_graphs(least=devices, most=most))
    operators = len(graph.operators)
    link = Link(
        bandwidth_bytes_per_s=draw(st.sampled_from([50.0, 500.0, 1e6])),
        latency_s=draw(st.sampled_from([1e-3, 0.1])),
        occupies_device=draw(st.booleans()),
    )
    links = {}
    if draw(st.booleans()):
        links = {("cpu0", "cpu1"): replace(link, occupies_device=not link.occupies_device)}
    return problem(
        graph,
        speeds=[draw(st.sampled_from([1.0, 0.5, 0.8])) for _ in range(devices)],
        seconds=draw(st.lists(seconds, min_size=operators, max_size=operators)),
        counts=draw(st.sampled_from([(1, 2), (1, 4), (2, 3)])),
        link=link,
        links=links,
        memory_bytes=draw(st.integers(300, 2500)) if memory else 10**9,
        delay_s=draw(st.sampled_from([0.0, 0.3])),
        overhead_s=draw(st.sampled_from([0.0, 0.05])),
        optimizer_s_per_byte=draw(st.sampled_from([0.0, 0.01])),
        loss_s=draw(st.sampled_from([0.0, 0.7])),
        clips_norm=draw(st.booleans()),
        weight_share=draw(st.sampled_from([0.0, 0.5])),
    )


def splits(request: PartitionProblem, most_stages: int):
    """All splits into intervals of the planner's orders, on all arrangements of devices, in all modes."""
    atoms = gather_atoms(request.graph)
    names = [device.name for device in request.cluster.devices]
    count = len(atoms.members)
    for order in linear_orders(request.graph, atoms, request.costs[min(request.costs)].tensor_bytes):
        for stages in range(1, min(most_stages, count) + 1):
            for cuts in combinations(range(1, count), stages - 1):
                bounds = (0, *cuts, count)
                operators = [
                    tuple(sorted(o for atom in order[a:b] for o in atoms.members[atom]))
                    for a, b in pairwise(bounds)
                ]
                for devices in permutations(names, stages):
                    split = [Stage(device=d, operators=o) for d, o in zip(devices, operators, strict=True)]
                    for microbatches in request.costs:
                        for schedule in Schedule:
                            yield split, microbatches, schedule


def replicas(request: PartitionProblem):
    """The whole model on two devices or more, the microbatches shared in every way."""
    everything = tuple(range(len(request.graph.operators)))
    if changed_buffer(request.graph, everything):
        return
    names = [device.name for device in request.cluster.devices]
    for microbatches in request.costs:
        for count in range(2, min(len(names), microbatches) + 1):
            for devices in combinations(names, count):
                for ends in combinations(range(1, microbatches), count - 1):
                    shares = [b - a for a, b in pairwise((0, *ends, microbatches))]
                    split = [
                        Stage(device=device, operators=everything, share=share)
                        for device, share in zip(devices, shares, strict=True)
                    ]
                    yield split, microbatches, Schedule.ONE_F_ONE_B


def partly_replicated(request: PartitionProblem):
    """Two stages on three devices, one of them with a replica; they share as the planner lets them."""
    for split, microbatches, schedule in splits(request, 2):
        if len(split) == 2:
            names = [device.name for device in request.cluster.devices]
            (spare,) = set(names) - {stage.device for stage in split}
            costs = request.costs[microbatches]
            seconds_D = costs.forward_s_DO.sum(1) + costs.backward_s_DO.sum(1)
            seconds_D = seconds_D + costs.loss_forward_s_D + costs.loss_backward_s_D
            for place in (0, 1):
                if changed_buffer(request.graph, split[place].operators):
                    continue
                for pair in permutations([split[place].device, spare]):
                    shares = share_out(seconds_D[[names.index(name) for name in pair]], microbatches)
                    replicas = [
                        replace(split[place], device=name, share=share)
                        for name, share in zip(pair, shares, strict=True)
                    ]
                    if min(shares) > 0:
                        yield [*split[:place], *replicas, *split[place + 1 :]], microbatches, schedule


def assert_best(step_s: float, best_s: float) -> None:
    """A simpler plan may be preferred to one that is shorter by less than 0.1 %."""
    assert best_s * (1 - 1e-9) <= step_s <= best_s * (1.001 + 1e-9)


@relaxed(60)
@given(st.data())
def test_prediction_equals_the_plain_simulation(data) -> None:
    request = data.draw(problems(devices=3, most=7))
    ways = [*splits(request, 3), *replicas(request), *partly_replicated(request)]
    split, microbatches, schedule = data.draw(st.sampled_from(ways))
    split = [replace(stage, recompute=data.draw(st.booleans())) for stage in split]
    prediction = predict(request, split, microbatches, schedule)
    reference = Split(problem=request, stages=split, count=microbatches, schedule=schedule)
    assert prediction.step_s == pytest.approx(reference.step_s())
    for stage, predicted in enumerate(prediction.stages):
        assert predicted.memory_bytes == pytest.approx(reference.memory_bytes(stage), abs=1)


@relaxed(40)
@given(st.data())
def test_prediction_equals_the_plain_simulation_where_devices_take_turns(data) -> None:
    request = data.draw(problems(devices=2, most=8))
    atoms = gather_atoms(request.graph)
    chunks = data.draw(st.integers(2, 3))
    assume(len(atoms.members) >= 2 * chunks)
    order = linear_orders(request.graph, atoms, request.costs[min(request.costs)].tensor_bytes)[0]
    inner = st.lists(
        st.integers(1, len(order) - 1), min_size=2 * chunks - 1, max_size=2 * chunks - 1, unique=True
    )
    bounds = (0, *sorted(data.draw(inner)), len(order))
    split = [
        Stage(
            device=f"cpu{number % 2}",
            operators=tuple(sorted(o for atom in order[a:b] for o in atoms.members[atom])),
            recompute=data.draw(st.booleans()),
        )
        for number, (a, b) in enumerate(pairwise(bounds))
    ]
    count = data.draw(st.sampled_from(sorted(request.costs)))
    prediction = predict(request, split, count, Schedule.INTERLEAVED)
    reference = Split(problem=request, stages=split, count=count, schedule=Schedule.INTERLEAVED)
    assert prediction.step_s == pytest.approx(reference.step_s())
    for stage, predicted in enumerate(prediction.stages):
        assert predicted.memory_bytes == pytest.approx(reference.memory_bytes(stage), abs=1)


@relaxed(25)
@given(problems(devices=2))
def test_two_stages_are_the_best_of_all(request: PartitionProblem) -> None:
    assume(len(gather_atoms(request.graph).members) >= 2)
    best_s = min(
        Split(problem=request, stages=split, count=microbatches, schedule=schedule).step_s()
        for split, microbatches, schedule in (*splits(request, 2), *replicas(request))
    )
    assert_best(partition(request, max_chunks=1).prediction.step_s, best_s)


@relaxed(15)
@given(problems(devices=3, most=5))
def test_three_stages_are_the_best_of_all(request: PartitionProblem) -> None:
    assume(len(gather_atoms(request.graph).members) >= 3)
    ways = (*splits(request, 3), *replicas(request), *partly_replicated(request))
    best_s = min(predict(request, *way).step_s for way in ways)
    assert_best(partition(request, max_chunks=1).prediction.step_s, best_s)


@relaxed(25)
@given(problems(devices=2, memory=True))
def test_memory_is_kept_or_the_answer_says_what_is_missing(request: PartitionProblem) -> None:
    assume(len(gather_atoms(request.graph).members) >= 2)
    capacity_bytes = request.cluster.devices[0].memory_bytes
    fitting: list[float] = []
    missing: list[float] = []
    for split, microbatches, schedule in splits(request, 2):
        kept = [p.memory_bytes for p in predict(request, split, microbatches, schedule).stages]
        again = [replace(stage, recompute=True) for stage in split]
        least = [p.memory_bytes for p in predict(request, again, microbatches, schedule).stages]
        recompute = [a > capacity_bytes and b < a for a, b in zip(kept, least, strict=True)]
        chosen = [replace(stage, recompute=r) for stage, r in zip(split, recompute, strict=True)]
        prediction = predict(request, chosen, microbatches, schedule)
        excess = max(p.memory_bytes for p in prediction.stages) - capacity_bytes
        if excess > 0:
            missing.append(excess)
        else:
            fitting.append(prediction.step_s)
    if fitting:
        plan = partition(request, max_replicas=1, max_chunks=1)
        assert_best(plan.prediction.step_s, min(fitting))
        assert all(p.memory_bytes <= capacity_bytes for p in plan.prediction.stages)
    else:
        with pytest.raises(InfeasiblePlan) as caught:
            partition(request, max_replicas=1, max_chunks=1)
        assert caught.value.short_bytes == pytest.approx(min(missing), abs=1)


@relaxed(30)
@given(problems(devices=3, most=9))
def test_plans_are_splits_and_predict_agrees(request: PartitionProblem) -> None:
    assume(len(gather_atoms(request.graph).members) >= 3)
    plan = partition(request)
    again = predict(request, plan.stages, plan.microbatches, plan.schedule)
    assert again.step_s == pytest.approx(plan.prediction.step_s)
    places = [group[0] for group in replica_groups(plan.stages)]
    assert sorted(o for stage in places for o in stage.operators) == list(range(len(request.graph.operators)))
    for group in request.graph.colocated:
        assert sum(not set(group).isdisjoint(stage.operators) for stage in places) == 1
    assert plan == partition(request)


@relaxed(6)
@given(st.data())
def test_too_many_cuts_to_try_are_cut_nearly_as_well(data) -> None:
    """Three stages of 70 operators on unlike devices: proposals and refinement against all cuts."""
    builder = GraphBuilder()
    names = ["x"]
    for index in range(70):
        inputs = {names[-1], data.draw(st.sampled_from(names[-6:]))}
        elements = data.draw(st.sampled_from([64, 512, 4096]))
        names.append(builder.add(f"op{index}", *sorted(inputs), elements=elements))
    request = problem(
        builder.build([names[-1]], {"x": 64}),
        speeds=(1.0, 0.7, 0.4),
        seconds=[data.draw(st.sampled_from([0.0001, 0.001, 0.01, 0.05])) for _ in range(70)],
        counts=(4,),
        link=Link(bandwidth_bytes_per_s=1e7, latency_s=1e-4, occupies_device=True),
    )
    workload = tabulate(request)
    cuts = list(combinations(range(1, 70), 2))
    splits = cut([Line(workload, range(70), 70)], [np.array([(0, *c, 71) for c in cuts]).T])
    mode = Mode(choice=0, layout=Layout.pipeline(3, 4), schedule=Schedule.ONE_F_ONE_B)
    best_s = min(
        evaluate(
            Pricing.of(request), splits, np.repeat(np.array(devices)[:, None], len(cuts), 1), mode
        ).score_N.min()
        for devices in permutations(range(3))
    )
    assert partition(request, max_replicas=1, max_chunks=1).prediction.step_s <= 1.05 * best_s
