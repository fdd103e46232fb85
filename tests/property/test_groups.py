"""Plans for several devices against every pattern of stages and replicas, cut everywhere."""

from __future__ import annotations

from itertools import accumulate, combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from forescale.core.cluster import Link
from forescale.graph.model import ModelGraph
from forescale.plan.evaluation import Mode, Pricing, evaluate
from forescale.plan.line import Line, cut
from forescale.plan.order import gather_atoms, linear_orders
from forescale.plan.partition import partition
from forescale.plan.partition_plan import Schedule, replica_groups
from forescale.plan.problem import PartitionProblem
from forescale.plan.replicas import changed_buffer, share_out
from forescale.plan.schedule import Layout, deal
from forescale.plan.workload import tabulate
from unit.plan.graphs import GraphBuilder, problem


def relaxed(examples: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, suppress_health_check=slow)


@st.composite
def graphs(draw, *, least: int, most: int) -> ModelGraph:
    """A chain with skips, parameters of many sizes, and now and then a buffer that a stage changes."""
    builder = GraphBuilder()
    names = ["x"]
    builder.buffer("running", 4)
    for index in range(draw(st.integers(least, most))):
        inputs = dict.fromkeys([names[-1], draw(st.sampled_from(names[-2:]))])
        parameter = builder.parameter(f"p{index}", draw(st.sampled_from([1, 200, 4000])))
        changes = draw(st.integers(0, 6)) == 0 and not builder.updates
        names.append(
            builder.add(
                f"op{index}",
                *inputs,
                elements=draw(st.sampled_from([1, 64, 1024])),
                parameters=[parameter],
                buffers=["running"] if changes else [],
                updates="running" if changes else None,
            )
        )
        if index:
            builder.save(names[-2], index)
    return builder.build([names[-1]], {"x": 16})


@st.composite
def problems(draw, *, devices: int, least: int, most: int, kinds: bool) -> PartitionProblem:
    graph = draw(graphs(least=least, most=most))
    count = len(graph.operators)
    return problem(
        graph,
        speeds=[draw(st.sampled_from([1.0, 0.5])) if kinds else 1.0 for _ in range(devices)],
        seconds=[draw(st.sampled_from([0.1, 0.5, 1.0, 3.0])) for _ in range(count)],
        counts=draw(st.sampled_from([(1, 4), (2, 8), (6,)])),
        link=Link(
            bandwidth_bytes_per_s=draw(st.sampled_from([2e3, 1e5, 1e9])),
            latency_s=1e-3,
            occupies_device=draw(st.booleans()),
        ),
        overhead_s=draw(st.sampled_from([0.0, 0.02])),
        optimizer_s_per_byte=draw(st.sampled_from([0.0, 1e-6])),
    )


def patterns(devices: int) -> list[tuple[int, ...]]:
    return [
        tuple(b - a for a, b in pairwise((0, *cuts, used)))
        for used in range(1, devices + 1)
        for places in range(1, used + 1)
        for cuts in combinations(range(1, used), places - 1)
    ]


def best_of_all_s(request: PartitionProblem) -> float:
    """The shortest step of all patterns, cuts, devices and modes; of one order of the operators."""
    workload, pricing = tabulate(request), Pricing.of(request)
    atoms, speeds = gather_atoms(request.graph), [d.speed for d in request.cluster.devices]
    best_s = np.inf
    for order in linear_orders(request.graph, atoms, request.costs[workload.counts[0]].tensor_bytes)[:1]:
        position = {atom: index for index, atom in enumerate(order)}
        line = Line(workload, [position[atom] for atom in atoms.atom_of], len(order))
        for pattern in patterns(len(speeds)):
            inner = list(combinations(range(1, line.length), len(pattern) - 1))
            if not inner:
                continue
            bounds_BN = np.array([(0, *cuts, line.length + 1) for cuts in inner]).T
            positions = [place for place, number in enumerate(pattern) for _ in range(number)]
            splits = cut([line], [bounds_BN], positions)
            rows = {
                tuple(speeds[d] for d in row): row for row in permutations(range(len(speeds)), sum(pattern))
            }
            for row in rows.values():
                for choice, count in enumerate(workload.counts):
                    layout = shared(workload, pattern, row, choice)
                    if layout is None:
                        continue
                    devices_SN = np.repeat(np.array(row)[:, None], len(inner), axis=1)
                    for schedule in Schedule if count > 1 and len(pattern) > 1 else [Schedule.ONE_F_ONE_B]:
                        mode = Mode(choice=choice, layout=layout, schedule=schedule)
                        best_s = min(best_s, evaluate(pricing, splits, devices_SN, mode).score_N.min())
    return float(best_s)


def shared(workload, pattern: tuple[int, ...], row: tuple[int, ...], choice: int) -> Layout | None:
    count = workload.counts[choice]
    seconds_D = (workload.forward_s_CDO[choice] + workload.backward_s_CDO[choice]).sum(axis=1)
    ends = list(accumulate(pattern))
    shares = [share_out(seconds_D[list(row[e - n : e])], count) for n, e in zip(pattern, ends, strict=True)]
    if min(map(min, shares)) == 0:
        return None
    return Layout(
        microbatches=count,
        positions_S=tuple(place for place, number in enumerate(pattern) for _ in range(number)),
        runs_S=tuple(runs for group in shares for runs in deal(group, count)),
    )


@relaxed(12)
@given(problems(devices=3, least=3, most=6, kinds=True))
def test_three_devices_are_used_as_well_as_possible(request: PartitionProblem) -> None:
    assume(len(gather_atoms(request.graph).members) >= 3)
    assert partition(request).prediction.step_s <= best_of_all_s(request) * (1.001 + 1e-9)


@relaxed(8)
@given(problems(devices=4, least=4, most=6, kinds=False))
def test_four_equal_devices_are_used_as_well_as_possible(request: PartitionProblem) -> None:
    assume(len(gather_atoms(request.graph).members) >= 4)
    assert partition(request).prediction.step_s <= best_of_all_s(request) * (1.001 + 1e-9)


@pytest.mark.parametrize("kinds", [False, True])
@relaxed(5)
@given(st.data())
def test_many_devices_are_used_nearly_as_well_as_possible(kinds: bool, data) -> None:
    """Five are so many that groups are proposed instead of trying all patterns."""
    request = data.draw(problems(devices=5, least=5, most=7, kinds=kinds))
    assume(len(gather_atoms(request.graph).members) >= 5)
    plan = partition(request)
    assert plan.prediction.step_s <= 1.1 * best_of_all_s(request)
    for group in replica_groups(plan.stages):
        assert len(group) == 1 or changed_buffer(request.graph, group[0].operators) is None
