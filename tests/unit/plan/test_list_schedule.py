"""List schedules and HEFT."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from forescale.core.errors import InfeasiblePlan
from forescale.plan.placement.latency import place_for_latency, scheduled_as
from forescale.plan.placement.list_schedule import Timetable
from forescale.plan.placement.problem import DeviceKind, Net, PlacementProblem
from unit.plan.placements import chain

# Figures 2 and 3 of Topcuoglu, Hariri and Wu (2002): times on three processors, and what edges cost.
TIMES = (
    *((14, 16, 9), (13, 19, 18), (11, 13, 19), (13, 8, 17), (12, 13, 10)),
    *((13, 16, 9), (7, 15, 11), (5, 11, 14), (18, 12, 20), (21, 7, 16)),
)
EDGES = {
    (a, b): cost
    for a, b, cost in (
        *((1, 2, 18), (1, 3, 12), (1, 4, 9), (1, 5, 11), (1, 6, 14), (2, 8, 19), (2, 9, 16), (3, 7, 23)),
        *((4, 8, 27), (4, 9, 23), (5, 9, 13), (6, 8, 15), (7, 10, 17), (8, 10, 11), (9, 10, 13)),
    )
}


def published() -> PlacementProblem:
    return PlacementProblem(
        nodes=tuple(f"n{number}" for number in range(1, 11)),
        work_KN=np.array(TIMES, dtype=float).T,
        memory_bytes_N=np.ones(10),
        nets=tuple(Net(cost=float(cost), nodes=(a - 1, b - 1)) for (a, b), cost in EDGES.items()),
        together=(),
        backward_N=np.zeros(10, dtype=bool),
        kinds=tuple(
            DeviceKind(name=name, count=1, memory_bytes=100.0, pays_transfers=True) for name in "pqr"
        ),
    )


def heft(problem: PlacementProblem, capacity: float) -> list[int] | None:
    atom_N, devices = np.arange(len(problem.nodes)), len(problem.devices)
    return Timetable(problem).heft(atom_N, problem.memory_bytes_N.tolist(), [capacity] * devices)


def test_heft_finds_the_schedule_of_its_paper() -> None:
    found = heft(published(), 100.0)
    assert found is not None
    assert Timetable(published()).schedule(found).latency == 80.0


def test_local_search_goes_on_from_there() -> None:
    assert place_for_latency(published(), contiguous=False).objective <= 77.0


def test_heft_keeps_to_memory_or_gives_up() -> None:
    tight = heft(published(), 4.0)
    assert tight is not None
    assert np.bincount(tight).max() <= 4
    assert heft(published(), 3.0) is None


def test_a_node_runs_in_a_gap_that_is_long_enough() -> None:
    problem = replace(
        published(),
        nodes=("a", "b", "gap", "end"),
        work_KN=np.array([[5.0, 20.0, 3.0, 1.0]] * 3),
        memory_bytes_N=np.ones(4),
        nets=(Net(cost=4.0, nodes=(0, 1)), Net(cost=4.0, nodes=(1, 3))),
        backward_N=np.zeros(4, dtype=bool),
    )
    placement = scheduled_as(problem, [0, 1, 0, 0], lower_bound=0.0)
    assert placement.start_N is not None
    assert placement.start_N.tolist() == [0.0, 9.0, 5.0, 33.0]
    assert placement.objective == 34.0
    assert Timetable(problem).schedule([0, 1, 0, 0]).chain == [0, 1, 3]


def test_devices_that_pay_nothing_hand_over_at_once() -> None:
    problem = chain([1.0, 1.0], cost=7.0)
    free = tuple(replace(kind, pays_transfers=False) for kind in problem.kinds)
    assert scheduled_as(problem, [0, 1], lower_bound=0.0).objective == 9.0
    assert scheduled_as(problem, [0, 2], lower_bound=0.0).objective == 18.0  # ten times as long on the CPU
    assert scheduled_as(replace(problem, kinds=free), [0, 1], lower_bound=0.0).objective == 2.0


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_chain_too_large_for_one_device_is_cut_where_that_is_cheap(contiguous: bool) -> None:
    problem = chain([1.0] * 5, sizes=[25.0, 25.0, 25.0, 25.0, 25.0])
    costs = (9.0, 2.0, 9.0, 9.0)
    nets = tuple(Net(cost=cost, nodes=(n, n + 1)) for n, cost in enumerate(costs))
    found = place_for_latency(replace(problem, nets=nets), contiguous=contiguous)
    assert found.objective == 7.0
    assert found.device_N.tolist() in ([0, 0, 1, 1, 1], [1, 1, 0, 0, 0])
    assert found.lower_bound <= 7.0


@pytest.mark.parametrize("contiguous", [False, True])
def test_what_fits_nowhere_is_refused(contiguous: bool) -> None:
    problem = published()
    small = tuple(replace(kind, memory_bytes=3.0) for kind in problem.kinds)
    with pytest.raises(InfeasiblePlan):
        place_for_latency(replace(problem, kinds=small), contiguous=contiguous)
