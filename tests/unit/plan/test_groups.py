"""Plans for more devices than all patterns could be tried for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from forescale.core.cluster import Link
from forescale.core.errors import InfeasiblePlan
from forescale.graph.model import ModelGraph
from forescale.plan.partition import partition, predict
from forescale.plan.partition_plan import PartitionPlan, Schedule, Stage, replica_groups
from forescale.plan.problem import PartitionProblem
from forescale.plan.regrouping import regroupings
from unit.plan.graphs import GraphBuilder, chain, problem


def blocks(count: int, *, parameter_elements: int, changes: int | None = None) -> ModelGraph:
    """Blocks of three operators, the second with a parameter; one of them may change a buffer."""
    builder = GraphBuilder()
    builder.buffer("running", 4)
    last = "x"
    for block in range(count):
        first = builder.add(f"norm{block}", last, elements=64)
        builder.save(last, 3 * block) if block else None
        parameter = builder.parameter(f"weight{block}", parameter_elements)
        second = builder.add(f"linear{block}", first, elements=64, parameters=[parameter])
        builder.save(first, 3 * block + 1)
        last = builder.add(
            f"add{block}",
            second,
            last,
            elements=64,
            updates="running" if block == changes else None,
            buffers=["running"] if block == changes else [],
        )
    return builder.build([last], {"x": 64})


def shape(plan: PartitionPlan) -> list[int]:
    """On how many devices each stage runs."""
    return [len(group) for group in replica_groups(plan.stages)]


def uniform_s(request: PartitionProblem) -> list[float]:
    """Steps of even pipelines of all lengths, and of replicas of the whole model on any number of devices."""
    names = [device.name for device in request.cluster.devices]
    operators = len(request.graph.operators)
    steps: list[float] = []
    for microbatches in request.costs:
        for used in range(1, len(names) + 1):
            cuts = [operators * place // used for place in range(used + 1)]
            pipeline = [
                Stage(device=name, operators=tuple(range(start, stop)))
                for name, start, stop in zip(names, cuts, cuts[1:], strict=False)
            ]
            ways: list[Sequence[Stage]] = [pipeline]
            if used <= microbatches:
                whole = tuple(range(operators))
                ways.append([Stage(device=name, operators=whole) for name in names[:used]])
            steps += [predict(request, way, microbatches, Schedule.EAGER_1F1B).step_s for way in ways]
    return steps


@pytest.mark.parametrize("speeds", [(1.0,) * 12, (1.0,) * 6 + (0.4,) * 6])
def test_no_slower_than_pipelines_or_replicas(speeds: tuple[float, ...]) -> None:
    link = Link(bandwidth_bytes_per_s=1e6, latency_s=1e-3)
    request = problem(
        blocks(16, parameter_elements=20_000), speeds=speeds, seconds=[0.1, 1.0, 0.1] * 16, link=link
    )
    assert partition(request).prediction.step_s <= min(uniform_s(request))


def test_stages_have_replicas_of_their_own_number() -> None:
    """Neither all parameters everywhere nor one device per stage: the middle is better by far."""
    request = problem(
        blocks(6, parameter_elements=20_000),
        speeds=(1.0,) * 12,
        seconds=[0.1, 5.0, 0.1] * 6,
        link=Link(bandwidth_bytes_per_s=1e5, latency_s=1e-3),
        counts=(24,),
    )
    plan = partition(request)
    assert 1 < len(shape(plan)) < 12
    assert max(shape(plan)) > 1
    assert plan.prediction.step_s < 0.8 * min(uniform_s(request))


def test_only_the_stage_that_changes_a_buffer_has_no_replicas() -> None:
    for devices in (3, 12):
        seconds = [20.0 if operator == 16 else 1.0 for operator in range(24)]  # one that cannot be cut
        graph = blocks(8, parameter_elements=10, changes=0)
        request = problem(graph, speeds=(1.0,) * devices, seconds=seconds, counts=(8,))
        plan = partition(request)
        changing = [group for group in replica_groups(plan.stages) if 2 in group[0].operators]
        assert [len(group) for group in changing] == [1]
        assert max(shape(plan)) > 1


def test_more_devices_than_are_of_use_stay_idle() -> None:
    plan = partition(problem(chain(40), speeds=(1.0,) * 8 + (0.001,) * 4))
    assert {stage.device for stage in plan.stages} <= {f"cpu{index}" for index in range(8)}


def test_limits_hold_for_many_devices_too() -> None:
    request = problem(chain(40), speeds=(1.0,) * 12, counts=(4, 8))
    assert len(partition(request, max_stages=6).stages) <= 6
    assert set(shape(partition(request, max_replicas=1))) == {1}
    assert max(shape(partition(request, max_replicas=2))) <= 2
    order = [f"cpu{index}" for index in range(11, 2, -1)]
    devices = [stage.device for stage in partition(request, devices_order=order).stages]
    assert devices == [name for name in order if name in devices]


def test_what_fits_only_in_part_is_split_over_many() -> None:
    graph = chain(40, elements=8, parameter_elements=1000)
    whole = problem(graph, speeds=(1.0,) * 12, counts=(8,), memory_bytes=10**9)
    assert shape(partition(whole)) == [8]
    tight = problem(graph, speeds=(1.0,) * 12, counts=(8,), memory_bytes=250_000)
    plan = partition(tight)
    assert len(shape(plan)) >= 3
    assert all(stage.memory_bytes <= 250_000 for stage in plan.prediction.stages)
    with pytest.raises(InfeasiblePlan):
        partition(problem(graph, speeds=(1.0,) * 12, counts=(8,), memory_bytes=30_000))


def test_every_small_change_of_groups_is_offered() -> None:
    """Devices 0 to 3 are of one class and 4 of another; 3 and 4 are idle or not."""
    classes = [0, 0, 0, 0, 4]
    changed = {tuple(groups) for groups in regroupings([0, 1, 2], [0, 0, 1], classes)}
    assert ((0, 1, 3), (2,)) in changed  # one that was idle
    assert ((0, 1), (4,), (2,)) in changed
    assert ((0,), (1,), (2,)) in changed  # split
    assert ((0, 1, 2),) in changed  # joined
    assert ((0,), (2, 1)) in changed  # moved
    assert not any(set(group) == {0, 3} for groups in changed for group in groups)  # exchanged with an equal
    exchanged = {tuple(groups) for groups in regroupings([0, 1, 2, 4], [0, 0, 0, 1], classes)}
    assert ((0, 1, 4), (2,)) in exchanged
