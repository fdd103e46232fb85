"""Placements on two nodes of two devices, against all there are, with loads worked out another way."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.core.errors import InvalidInput
from forescale.plan.placement import far_line
from forescale.plan.placement import place as placing
from forescale.plan.placement.annealing import FarAssignment
from forescale.plan.placement.atoms import atoms, merge
from forescale.plan.placement.certificate import certify
from forescale.plan.placement.loads import loads
from forescale.plan.placement.place import place
from forescale.plan.placement.problem import DeviceKind, Net, PlacementProblem, order_of
from unit.plan.placements import random_nets

DEVICES = 5
NODE_OF = [0, 0, 1, 1, 2]
"""Two nodes of two accelerators, and a CPU that is far from all."""


@st.composite
def problems(draw: st.DrawFn, *, only_chains: bool = False, cpus: int = 1) -> PlacementProblem:
    count = draw(st.integers(1, 5))
    costs = st.integers(0, 9).map(float)
    readers = [
        [source + 1] if only_chains else sorted(draw(st.sets(st.integers(source + 1, count - 1), max_size=3)))
        for source in range(count - 1)
    ]
    nets: list[Net] = []
    for source, read in enumerate(readers):
        if read:
            near = draw(costs)
            nets.append(Net(cost=near, nodes=(source, *read), far_costs=(near + draw(costs),)))
    work = draw(st.lists(st.tuples(costs, costs), min_size=count, max_size=count))
    return PlacementProblem(
        nodes=tuple(f"n{number}" for number in range(count)),
        work_KN=np.array(work).T,
        memory_bytes_N=np.array(draw(st.lists(st.integers(1, 5), min_size=count, max_size=count)), float),
        nets=tuple(nets),
        together=(),
        backward_N=np.zeros(count, dtype=bool),
        kinds=(
            DeviceKind(
                name="acc", count=4, memory_bytes=draw(st.sampled_from([9.0, 30.0])), pays_transfers=True
            ),
            DeviceKind(name="cpu", count=cpus, memory_bytes=np.inf, pays_transfers=False),
        ),
        unit_devices=(2,),
    )


def longest_load(problem: PlacementProblem, devices: tuple[int, ...]) -> float:
    total = [0.0] * DEVICES
    for node, device in enumerate(devices):
        total[device] += problem.work_KN[int(device == 4), node]
    for net in problem.nets:
        (near, far), source = (net.cost, *net.far_costs), devices[net.nodes[0]]
        paid: dict[int, float] = {}
        for reader in {devices[node] for node in net.nodes[1:]} - {source}:
            cost = near if NODE_OF[reader] == NODE_OF[source] else far
            paid[reader] = cost
            paid[source] = max(paid.get(source, 0.0), cost)
        for device, cost in paid.items():
            total[device] += cost * (device != 4)
    return max(total)


def everything(problem: PlacementProblem, devices: int = DEVICES) -> list[tuple[int, ...]]:
    return [
        found
        for found in product(range(devices), repeat=len(problem.nodes))
        if all(
            sum(problem.memory_bytes_N[n] for n, d in enumerate(found) if d == device)
            <= problem.kinds[0].memory_bytes
            for device in range(4)
        )
    ]


@settings(max_examples=100, deadline=None)
@given(problem=problems(), data=st.data())
def test_who_exchanges_what_decides_what_it_costs(problem: PlacementProblem, data: st.DataObject) -> None:
    count = len(problem.nodes)
    devices = data.draw(st.lists(st.integers(0, DEVICES - 1), min_size=count, max_size=count))
    assert loads(problem, devices).max() == pytest.approx(longest_load(problem, tuple(devices)))


@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data())
def test_moves_keep_the_loads(problem: PlacementProblem, data: st.DataObject) -> None:
    count = len(problem.nodes)
    places = st.lists(st.integers(0, DEVICES - 1), min_size=count, max_size=count)
    parts = merge(problem, atoms(problem))
    parts = replace(parts, nets=parts.nets.bundled())
    assignment = FarAssignment(problem, parts, data.draw(places))
    for atom, target in enumerate(data.draw(places)):
        assignment.move(atom, target)
        assert assignment.load_D == pytest.approx(loads(problem, assignment.device_A).tolist())


def random_problem(seed: int) -> PlacementProblem:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 6))
    return PlacementProblem(
        nodes=tuple(f"n{number}" for number in range(count)),
        work_KN=rng.integers(0, 10, (2, count)).astype(float),
        memory_bytes_N=rng.integers(1, 6, count).astype(float),
        nets=random_nets(rng, count),
        together=(),
        backward_N=np.zeros(count, dtype=bool),
        kinds=(
            DeviceKind(name="acc", count=4, memory_bytes=(9.0, 30.0)[seed % 2], pays_transfers=True),
            DeviceKind(name="cpu", count=1, memory_bytes=np.inf, pays_transfers=False),
        ),
        unit_devices=(2,),
    )


def test_free_placements_are_the_best_of_all_or_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "_MOVES_PER_ATOM", 600)
    ratios: list[float] = []
    for seed in range(30):
        problem = random_problem(seed)
        best = min(longest_load(problem, devices) for devices in everything(problem))
        found = place(problem, contiguous=False)
        devices = tuple(found.device_N.tolist())
        assert devices in everything(problem)
        assert found.objective == pytest.approx(longest_load(problem, devices))
        assert found.lower_bound <= best + 1e-9
        ratios.append(found.objective / best)
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 27
    assert max(ratios) < 1.3


@settings(max_examples=60, deadline=None)
@given(problem=problems(only_chains=True, cpus=0))
def test_intervals_of_a_chain_are_the_best_of_all(problem: PlacementProblem) -> None:
    intervals = [
        devices
        for devices in everything(problem, 4)
        if all(b == a or b not in devices[: at + 1] for at, (a, b) in enumerate(pairwise(devices)))
    ]
    best = min(longest_load(problem, devices) for devices in intervals)
    found = place(problem, contiguous=True)
    assert tuple(found.device_N.tolist()) in intervals
    assert found.objective == pytest.approx(best)
    assert found.lower_bound <= best + 1e-9


def goes_forward(problem: PlacementProblem, devices: tuple[int, ...]) -> bool:
    apart = sorted({(devices[a], devices[b]) for a, b in problem.edges if devices[a] != devices[b]})
    try:
        order_of(len(problem.devices), apart, problem.devices)
    except InvalidInput:
        return False
    return True


@pytest.mark.parametrize("boundaries", [500, 3])
def test_intervals_of_any_graph_are_the_best_of_all_or_near(
    boundaries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far_line, "_MOST_BOUNDARIES", boundaries)
    monkeypatch.setattr(far_line, "_TRIES", 500)
    ratios: list[float] = []
    for seed in range(30):
        problem = random_problem(seed)
        intervals = [devices for devices in everything(problem) if goes_forward(problem, devices)]
        best = min(longest_load(problem, devices) for devices in intervals)
        found = place(problem, contiguous=True)
        devices = tuple(found.device_N.tolist())
        assert devices in intervals
        assert found.objective == pytest.approx(longest_load(problem, devices))
        ratios.append(found.objective / best)
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 24
    assert max(ratios) < 1.5


def test_a_large_graph_is_placed_by_distance_too() -> None:
    """More nodes than are annealed one by one; every tenth is also read ten nodes later."""
    count = 1500
    rng = np.random.default_rng(0)
    cost_N = rng.uniform(0.5, 5.0, count)
    problem = PlacementProblem(
        nodes=tuple(map(str, range(count))),
        work_KN=rng.uniform(0.1, 2.0, (1, count)),
        memory_bytes_N=np.ones(count),
        nets=tuple(
            Net(
                cost=cost_N[n],
                nodes=(n, n + 1, n + 10) if n % 10 == 0 and n + 10 < count else (n, n + 1),
                far_costs=(9 * cost_N[n], 20 * cost_N[n]),
            )
            for n in range(count - 1)
        ),
        together=(),
        backward_N=np.zeros(count, dtype=bool),
        kinds=(DeviceKind(name="acc", count=8, memory_bytes=300.0, pays_transfers=True),),
        unit_devices=(2, 4),
    )
    assert problem.level_DD[0].tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    contiguous, free = (place(problem, contiguous=contiguous) for contiguous in (True, False))
    for found in (contiguous, free):
        assert found.objective == pytest.approx(loads(problem, found.device_N).max())
        assert (found.memory_bytes_D <= 300).all()
    assert goes_forward(problem, tuple(contiguous.device_N.tolist()))
    assert free.objective <= contiguous.objective
    assert contiguous.objective < 1.15 * contiguous.lower_bound


def test_few_devices_of_one_node_are_better_than_all_where_nodes_are_far_apart() -> None:
    problem = PlacementProblem(
        nodes=("a", "b", "c"),
        work_KN=np.array([[4.0, 4.0, 4.0]]),
        memory_bytes_N=np.ones(3),
        nets=tuple(Net(cost=1.0, nodes=(n, n + 1), far_costs=(20.0,)) for n in range(2)),
        together=(),
        backward_N=np.zeros(3, dtype=bool),
        kinds=(DeviceKind(name="acc", count=4, memory_bytes=9.0, pays_transfers=True),),
        unit_devices=(2,),
    )
    found = place(problem, contiguous=True)
    assert found.objective == 9.0
    assert set(found.device_N.tolist()) == {0, 1}


def test_the_cut_between_nodes_is_made_where_little_crosses() -> None:
    """Only behind the third block do few bytes cross: of four devices of the first node, one idles."""
    far = [30.0, 30.0, 1.0, 30.0, 30.0]
    problem = PlacementProblem(
        nodes=tuple("abcdef"),
        work_KN=np.array([[4.0] * 6]),
        memory_bytes_N=np.ones(6),
        nets=tuple(Net(cost=1.0, nodes=(n, n + 1), far_costs=(far[n],)) for n in range(5)),
        together=(),
        backward_N=np.zeros(6, dtype=bool),
        kinds=(DeviceKind(name="acc", count=6, memory_bytes=9.0, pays_transfers=True),),
        unit_devices=(3,),
    )
    assert place(problem, contiguous=True).objective == 6.0
    uneven = replace(problem, unit_devices=(4,))
    assert (
        place(uneven, contiguous=True).objective == 9.0
    )  # three devices of the first node, two of the other


def test_a_certificate_is_refused() -> None:
    problem = PlacementProblem(
        nodes=("a", "b"),
        work_KN=np.ones((1, 2)),
        memory_bytes_N=np.ones(2),
        nets=(Net(cost=1.0, nodes=(0, 1), far_costs=(2.0,)),),
        together=(),
        backward_N=np.zeros(2, dtype=bool),
        kinds=(DeviceKind(name="acc", count=4, memory_bytes=9.0, pays_transfers=True),),
        unit_devices=(2,),
    )
    with pytest.raises(InvalidInput, match="2 levels of links"):
        certify(problem, place(problem, contiguous=True), contiguous=True)


@pytest.mark.parametrize("far_costs", [(), (2.0, 3.0), (0.5,), (np.nan,)])
def test_a_tensor_has_a_cost_for_every_level_none_less_than_the_one_before(
    far_costs: tuple[float, ...],
) -> None:
    with pytest.raises(InvalidInput, match=r"a tensor needs 2 costs|negative cost"):
        PlacementProblem(
            nodes=("a", "b"),
            work_KN=np.ones((1, 2)),
            memory_bytes_N=np.ones(2),
            nets=(Net(cost=1.0, nodes=(0, 1), far_costs=far_costs),),
            together=(),
            backward_N=np.zeros(2, dtype=bool),
            kinds=(DeviceKind(name="acc", count=4, memory_bytes=9.0, pays_transfers=True),),
            unit_devices=(2,),
        )
