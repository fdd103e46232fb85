"""Placements of small graphs against all there are, with loads and contiguity worked out another way."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.core.errors import InfeasiblePlan
from forescale.plan.placement import line
from forescale.plan.placement.loads import loads, lower_bound
from forescale.plan.placement.place import place
from forescale.plan.placement.problem import DeviceKind, Net, PlacementProblem

DEVICES = 3


@st.composite
def problems(draw: st.DrawFn) -> PlacementProblem:
    count = draw(st.integers(1, 6))
    costs = st.integers(0, 9).map(float)
    nets = [
        Net(cost=draw(costs), nodes=(source, *sorted(readers)))
        for source in range(count - 1)
        if (readers := draw(st.sets(st.integers(source + 1, count - 1), max_size=3)))
    ]
    work = draw(st.lists(st.tuples(costs, costs), min_size=count, max_size=count))
    together = draw(st.sampled_from([(), ((0, count - 1),)])) if count > 2 else ()
    return PlacementProblem(
        nodes=tuple(f"n{number}" for number in range(count)),
        work_KN=np.array(work).T,
        memory_bytes_N=np.array(draw(st.lists(st.integers(1, 5), min_size=count, max_size=count)), float),
        nets=tuple(nets),
        together=together,
        backward_N=np.zeros(count, dtype=bool),
        kinds=(
            DeviceKind(
                name="acc", count=2, memory_bytes=draw(st.sampled_from([9.0, 30.0])), pays_transfers=True
            ),
            DeviceKind(name="cpu", count=1, memory_bytes=np.inf, pays_transfers=False),
        ),
    )


def longest_load(problem: PlacementProblem, devices: tuple[int, ...]) -> float:
    total = [0.0] * DEVICES
    for node, device in enumerate(devices):
        total[device] += problem.work_KN[1 if device == 2 else 0, node]
    for net in problem.nets:
        source, *readers = net.nodes
        for device in (0, 1):
            sends = devices[source] == device and any(devices[r] != device for r in readers)
            receives = devices[source] != device and any(devices[r] == device for r in readers)
            apart = devices[source] != device and receives
            total[device] += net.cost * (sends or apart)
    return max(total)


def allowed(problem: PlacementProblem, devices: tuple[int, ...]) -> bool:
    fits = all(
        sum(problem.memory_bytes_N[n] for n, d in enumerate(devices) if d == device)
        <= problem.kinds[0].memory_bytes
        for device in (0, 1)
    )
    return fits and all(len({devices[node] for node in group}) == 1 for group in problem.together)


def in_intervals(problem: PlacementProblem, devices: tuple[int, ...]) -> bool:
    """Whether the devices can be put in an order in which every tensor goes forward."""
    follows = {
        (devices[source], devices[reader])
        for source, reader in problem.edges
        if devices[source] != devices[reader]
    }
    while follows:
        first = {source for source, _ in follows} - {reader for _, reader in follows}
        if not first:
            return False
        follows = {(source, reader) for source, reader in follows if source not in first}
    return True


def everything(problem: PlacementProblem) -> list[tuple[int, ...]]:
    every = product(range(DEVICES), repeat=len(problem.nodes))
    return [devices for devices in every if allowed(problem, devices)]


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_a_contiguous_placement_is_the_best_of_all(problem: PlacementProblem) -> None:
    best = min(
        longest_load(problem, devices) for devices in everything(problem) if in_intervals(problem, devices)
    )
    found = place(problem, contiguous=True)
    devices = tuple(found.device_N.tolist())
    assert found.objective == pytest.approx(longest_load(problem, devices))
    assert allowed(problem, devices)
    assert in_intervals(problem, devices)
    assert found.objective == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_what_is_cut_coarsely_at_first_is_contiguous_too(problem: PlacementProblem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line, "_MOST_BOUNDARIES", 3)
        patch.setattr(line, "_PER_DEVICE", 1)
        found = place(problem, contiguous=True)
    devices = tuple(found.device_N.tolist())
    assert allowed(problem, devices)
    assert in_intervals(problem, devices)
    assert found.objective == pytest.approx(longest_load(problem, devices))


@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_a_free_placement_is_the_best_of_all(problem: PlacementProblem) -> None:
    best = min(longest_load(problem, devices) for devices in everything(problem))
    found = place(problem, contiguous=False)
    devices = tuple(found.device_N.tolist())
    assert allowed(problem, devices)
    assert found.objective == pytest.approx(longest_load(problem, devices))
    assert found.objective == pytest.approx(best)
    assert found.lower_bound <= best + 1e-9


@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data())
def test_no_assignment_is_below_the_bound(problem: PlacementProblem, data: st.DataObject) -> None:
    count = len(problem.nodes)
    devices = data.draw(st.lists(st.integers(0, DEVICES - 1), min_size=count, max_size=count))
    load = loads(problem, devices).max()
    assert load == pytest.approx(longest_load(problem, tuple(devices)))
    assert lower_bound(problem, np.arange(count)) <= load + 1e-9


def test_what_cannot_fit_is_named_with_the_bytes_missing() -> None:
    problem = PlacementProblem(
        nodes=("small", "large"),
        work_KN=np.ones((1, 2)),
        memory_bytes_N=np.array([1.0, 50.0]),
        nets=(Net(cost=1.0, nodes=(0, 1)),),
        together=(),
        backward_N=np.zeros(2, dtype=bool),
        kinds=(DeviceKind(name="acc", count=2, memory_bytes=20.0, pays_transfers=True),),
    )
    with pytest.raises(InfeasiblePlan, match=r"acc0 is short of 30 bytes; node large .* 50 bytes") as raised:
        place(problem, contiguous=True)
    assert raised.value.short_bytes == 30
