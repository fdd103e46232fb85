"""Placements for latency of small graphs, against all assignments in all orders."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from forescale.plan.placement import latency
from forescale.plan.placement.latency import latency_bound, place_for_latency, scheduled_as
from forescale.plan.placement.place import Placement
from forescale.plan.placement.problem import DeviceKind, Net, PlacementProblem
from unit.plan.placements import random_nets

NODE_OF = [0, 0, 1, 2]
"""Three accelerators, two of them in one node, and a CPU."""


@pytest.fixture(autouse=True, scope="module")
def few_tries() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "_MOST_TRIES", 600)
        yield


def random_problem(seed: int, most: int) -> PlacementProblem:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, most + 1))
    return PlacementProblem(
        nodes=tuple(f"n{number}" for number in range(count)),
        work_KN=rng.integers(0, 10, (2, count)).astype(float),
        memory_bytes_N=rng.integers(1, 6, count).astype(float),
        nets=random_nets(rng, count),
        together=((0, count - 1),) if count > 2 and seed % 3 == 0 else (),
        backward_N=np.zeros(count, dtype=bool),
        kinds=(
            DeviceKind(name="acc", count=3, memory_bytes=(10.0, 30.0)[seed % 2], pays_transfers=True),
            DeviceKind(name="cpu", count=1, memory_bytes=np.inf, pays_transfers=False),
        ),
        unit_devices=(2,),
    )


def time_of(problem: PlacementProblem, node: int, device: int) -> float:
    return float(problem.work_KN[int(device == 3), node])


def arrivals(problem: PlacementProblem, devices: tuple[int, ...]) -> dict[tuple[int, int], float]:
    """What every edge costs on the way."""
    taken: dict[tuple[int, int], float] = {}
    for net in problem.nets:
        source, *readers = net.nodes
        for reader in readers:
            a, b = devices[source], devices[reader]
            near, far = (net.cost, *net.far_costs)
            taken[source, reader] = 0.0 if a == b else near if NODE_OF[a] == NODE_OF[b] else far
    return taken


def shortest(problem: PlacementProblem, devices: tuple[int, ...]) -> float:
    """Over all orders in which nodes may be started, each as soon as its device and its inputs are there."""
    best, taken = np.inf, arrivals(problem, devices)
    for order in permutations(range(len(devices))):
        end: dict[int, float] = {}
        free = [0.0] * 4
        for node in order:
            inputs = [edge for edge in taken if edge[1] == node]
            if any(source not in end for source, _ in inputs):
                break
            ready = max((end[source] + taken[source, node] for source, _ in inputs), default=0.0)
            end[node] = max(ready, free[devices[node]]) + time_of(problem, node, devices[node])
            free[devices[node]] = end[node]
        else:
            best = min(best, max(end.values()))
    return best


def allowed(problem: PlacementProblem, devices: tuple[int, ...]) -> bool:
    fits = all(
        sum(problem.memory_bytes_N[n] for n, d in enumerate(devices) if d == device)
        <= problem.kinds[0].memory_bytes
        for device in range(3)
    )
    return fits and all(len({devices[node] for node in group}) == 1 for group in problem.together)


def everything(problem: PlacementProblem) -> list[tuple[int, ...]]:
    every = product(range(4), repeat=len(problem.nodes))
    return [devices for devices in every if allowed(problem, devices)]


def check_schedule(problem: PlacementProblem, placement: Placement) -> None:
    """Nothing runs before its inputs are there, no device runs two nodes at once."""
    assert placement.start_N is not None
    devices = tuple(placement.device_N.tolist())
    start = placement.start_N.tolist()
    end = [at + time_of(problem, node, devices[node]) for node, at in enumerate(start)]
    assert placement.objective == pytest.approx(max(end))
    for (source, reader), cost in arrivals(problem, devices).items():
        assert start[reader] >= end[source] + cost - 1e-9
    for a, b in product(range(len(devices)), repeat=2):
        if a < b and devices[a] == devices[b]:
            assert start[a] >= end[b] - 1e-9 or start[b] >= end[a] - 1e-9


@pytest.mark.parametrize("seed", range(60))
def test_schedules_can_be_kept_and_are_near_the_shortest(seed: int) -> None:
    problem = random_problem(seed, most=6)
    devices = np.random.default_rng(seed).integers(0, 4, len(problem.nodes)).tolist()
    placement = scheduled_as(problem, devices, lower_bound=0.0)
    check_schedule(problem, placement)
    best = shortest(problem, tuple(devices))
    assert best - 1e-9 <= placement.objective <= 1.5 * best + 1e-9
    assert latency_bound(problem, placement.objective) <= best + 1e-9


def in_intervals(problem: PlacementProblem, devices: tuple[int, ...]) -> bool:
    follows = {(devices[a], devices[b]) for a, b in problem.edges if devices[a] != devices[b]}
    while follows:
        first = {source for source, _ in follows} - {reader for _, reader in follows}
        if not first:
            return False
        follows = {(source, reader) for source, reader in follows if source not in first}
    return True


@pytest.mark.parametrize("contiguous", [False, True])
def test_placements_are_the_best_of_all_or_near(contiguous: bool) -> None:
    ratios: list[float] = []
    for seed in range(40):
        problem = random_problem(seed, most=5)
        every = [d for d in everything(problem) if not contiguous or in_intervals(problem, d)]
        best = min(shortest(problem, devices) for devices in every)
        found = place_for_latency(problem, contiguous=contiguous)
        check_schedule(problem, found)
        assert tuple(found.device_N.tolist()) in every
        assert found.lower_bound <= best + 1e-9
        assert found.objective >= best - 1e-9
        ratios.append(found.objective / best if best else 1.0)
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 35
    assert max(ratios) < 1.3


def test_branches_run_side_by_side_where_that_pays() -> None:
    work = [1.0, 6.0, 6.0, 1.0]
    problem = PlacementProblem(
        nodes=("fork", "left", "right", "join"),
        work_KN=np.array([work]),
        memory_bytes_N=np.ones(4),
        nets=(
            Net(cost=2.0, nodes=(0, 1, 2)),
            Net(cost=2.0, nodes=(1, 3)),
            Net(cost=2.0, nodes=(2, 3)),
        ),
        together=(),
        backward_N=np.zeros(4, dtype=bool),
        kinds=(DeviceKind(name="acc", count=2, memory_bytes=9.0, pays_transfers=True),),
    )
    for contiguous in (False, True):  # the other branch and the join: 1 + 2 + 6 + 1, all on one: 14
        assert place_for_latency(problem, contiguous=contiguous).objective == pytest.approx(10.0)
