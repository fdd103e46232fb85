"""Certificates of small placements, against all assignments there are."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from forescale.core.errors import InvalidInput
from forescale.plan.placement import certificate, cuts
from forescale.plan.placement.atoms import atoms, merge
from forescale.plan.placement.bounds import best_bound, packing_bound
from forescale.plan.placement.certificate import Certificate, certify
from forescale.plan.placement.cuts import transfer_bound
from forescale.plan.placement.loads import loads, lower_bound, memory_bytes
from forescale.plan.placement.place import Placement
from forescale.plan.placement.problem import DeviceKind, Net, PlacementProblem, order_of
from unit.plan.placements import answer, chain

DEVICES = 3


def random_problem(seed: int) -> PlacementProblem:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 7))
    nets = [
        Net(cost=float(rng.integers(0, 9)), nodes=(source, *(source + 1 + np.flatnonzero(read)).tolist()))
        for source in range(count - 1)
        if (read := rng.random(count - source - 1) < 0.5).any()
    ]
    backward_N = np.arange(count) >= count - int(rng.integers(0, 2))
    return PlacementProblem(
        nodes=tuple(f"n{number}" for number in range(count)),
        work_KN=rng.integers(1, 10, (2, count)).astype(float) * np.array([[1.0], [3.0]]),
        memory_bytes_N=rng.integers(1, 4, count).astype(float),
        nets=tuple(nets),
        together=((0, 2),) if seed % 3 == 0 else (),
        backward_N=backward_N,
        kinds=(
            DeviceKind(name="acc", count=2, memory_bytes=(7.0, 30.0)[seed % 2], pays_transfers=True),
            DeviceKind(name="cpu", count=1, memory_bytes=np.inf, pays_transfers=False),
        ),
    )


def in_intervals(problem: PlacementProblem, device_N: tuple[int, ...]) -> bool:
    ends = [
        (device_N[source], device_N[target])
        for source, target in problem.edges
        if not (problem.backward_N[source] or problem.backward_N[target])
    ]
    try:
        order_of(DEVICES, [(a, b) for a, b in ends if a != b], problem.devices)
    except InvalidInput:
        return False
    return True


def all_answers(problem: PlacementProblem, *, contiguous: bool) -> list[Placement]:
    capacity_D = [problem.kinds[kind].memory_bytes for kind in problem.kind_D]
    return [
        answer(problem, np.array(device_N))
        for device_N in product(range(DEVICES), repeat=len(problem.nodes))
        if all(len({device_N[node] for node in group}) == 1 for group in problem.together)
        and (memory_bytes(problem, device_N) <= capacity_D).all()
        and (not contiguous or in_intervals(problem, device_N))
    ]


def bound_with_transfers(problem: PlacementProblem) -> float:
    return transfer_bound(merge(problem, atoms(problem)), problem.kinds)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_the_worst_placement_is_replaced_by_a_proven_best(seed: int, contiguous: bool) -> None:
    problem = random_problem(seed)
    answers = all_answers(problem, contiguous=contiguous)
    best = min(found.objective for found in answers)
    worst = max(answers, key=lambda found: found.objective)
    proof = certify(problem, worst, contiguous=contiguous)
    assert proof.proven_optimal
    assert proof.objective == pytest.approx(best)
    assert proof.lower_bound == pytest.approx(best, rel=1e-5)
    assert proof.lower_bound <= best
    if worst.objective > best:
        assert proof.device_N is not None
        devices = tuple(proof.device_N.tolist())
        assert any(tuple(found.device_N.tolist()) == devices for found in answers)
        assert loads(problem, proof.device_N).max() == pytest.approx(best)


@pytest.mark.parametrize("seed", range(30))
def test_no_placement_is_below_the_bound_with_transfers(seed: int) -> None:
    problem = random_problem(seed)
    best = min(found.objective for found in all_answers(problem, contiguous=False))
    assert bound_with_transfers(problem) <= best + 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_no_placement_is_below_the_bound_of_whole_atoms(seed: int) -> None:
    problem = random_problem(seed)
    answers = all_answers(problem, contiguous=False)
    best = min(found.objective for found in answers)
    parts = merge(problem, atoms(problem))
    for found in answers[:: max(len(answers) // 20, 1)]:
        assert packing_bound(parts, problem.kinds, found.objective) <= best + 1e-9
        assert best_bound(problem, parts, found.objective) <= best + 1e-9


def test_one_device_more_than_devices_have_room_for_takes_another_atom() -> None:
    problem = chain([5.0, 5.0, 4.0, 4.0, 3.0], cost=0.0)  # ten times as long on the CPU
    parts = merge(problem, atoms(problem))
    assert packing_bound(parts, problem.kinds, objective=30.0) == pytest.approx(11.0)
    assert packing_bound(parts, problem.kinds, objective=100.0) == pytest.approx(8.0)
    assert packing_bound(parts, problem.kinds, objective=9.0) == pytest.approx(9.0)


def test_the_bound_with_transfers_knows_that_a_dear_tensor_keeps_its_ends_together() -> None:
    problem = replace(
        random_problem(1),
        nodes=("a", "b", "c"),
        work_KN=np.array([[6.0, 6.0, 1.0], [90.0, 90.0, 90.0]]),
        memory_bytes_N=np.ones(3),
        nets=(Net(cost=50.0, nodes=(0, 1)), Net(cost=2.0, nodes=(1, 2))),
        backward_N=np.zeros(3, dtype=bool),
    )
    assert lower_bound(problem, atoms(problem)) < 7
    assert bound_with_transfers(problem) == pytest.approx(13.0)  # c along with them costs less than 2


def test_a_cut_that_takes_too_long_still_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = chain([2.0, 3.0, 4.0, 3.0, 2.0], cost=50.0, count=3)
    problem = replace(problem, work_KN=problem.work_KN * np.array([[1.0], [10.0]]))
    assert bound_with_transfers(problem) == pytest.approx(14.0)
    monkeypatch.setattr(cuts, "_MOST_VISITS", 3)
    assert 0 < bound_with_transfers(problem) < 14


def test_what_no_accelerator_may_hold_shares_the_other_devices() -> None:
    problem = replace(
        random_problem(1),
        nodes=("a", "b"),
        work_KN=np.array([[np.inf, 100.0], [8.0, 9.0]]),
        memory_bytes_N=np.ones(2),
        nets=(),
        together=(),
        backward_N=np.zeros(2, dtype=bool),
    )
    assert bound_with_transfers(problem) == pytest.approx(17.0)


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_single_node_goes_to_the_faster_kind(contiguous: bool) -> None:
    problem = PlacementProblem(
        nodes=("only",),
        work_KN=np.array([[6.0], [7.0], [9.0]]),
        memory_bytes_N=np.array([3.0]),
        nets=(),
        together=(),
        backward_N=np.zeros(1, dtype=bool),
        kinds=(
            DeviceKind(name="quick", count=2, memory_bytes=20.0, pays_transfers=False),
            DeviceKind(name="none", count=0, memory_bytes=20.0, pays_transfers=True),
            DeviceKind(name="slow", count=1, memory_bytes=np.inf, pays_transfers=True),
        ),
    )
    proof = certify(problem, answer(problem, [2]), contiguous=contiguous)
    assert (proof.objective, proof.proven_optimal) == (6.0, True)
    assert proof.device_N is not None
    assert proof.device_N.tolist() in ([0], [1])


def test_the_best_placement_is_kept() -> None:
    problem = random_problem(4)
    best = min(all_answers(problem, contiguous=True), key=lambda found: found.objective)
    proof = certify(problem, best, contiguous=True)
    assert proof.proven_optimal
    assert proof.device_N is None


def test_memory_is_not_exceeded_for_a_shorter_load() -> None:
    problem = replace(
        random_problem(0),
        nodes=("a", "b"),
        work_KN=np.array([[6.0, 6.0], [90.0, 90.0]]),
        memory_bytes_N=np.full(2, 4.0),  # of 7 on each accelerator
        nets=(Net(cost=50.0, nodes=(0, 1)),),
        together=(),
        backward_N=np.zeros(2, dtype=bool),
    )
    proof = certify(problem, answer(problem, np.array([2, 2])), contiguous=False)
    assert proof.objective == pytest.approx(56.0)
    roomy = replace(problem, kinds=tuple(replace(kind, memory_bytes=8.0) for kind in problem.kinds))
    assert certify(roomy, answer(roomy, np.array([2, 2])), contiguous=False).objective == pytest.approx(12.0)


def test_large_graphs_are_left_to_the_other_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "_MOST_ATOMS", 2)
    problem = random_problem(4)
    worst = max(all_answers(problem, contiguous=False), key=lambda found: found.objective)
    proof = certify(problem, worst, contiguous=False)
    assert proof.note is not None
    assert "parts to place" in proof.note
    assert 0 < proof.lower_bound < worst.objective
    assert not proof.proven_optimal


def test_a_missing_solver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "find_spec", lambda name: None)
    problem = random_problem(4)
    first = all_answers(problem, contiguous=False)[0]
    with pytest.raises(InvalidInput, match=r"pip install 'forescale\[plan\]'"):
        certify(problem, first, contiguous=False)


@pytest.mark.parametrize("time_limit_s", [0.0, -1.0, float("nan")])
def test_a_time_limit_that_is_none_is_refused(time_limit_s: float) -> None:
    problem = random_problem(4)
    first = all_answers(problem, contiguous=False)[0]
    with pytest.raises(InvalidInput, match="time limit"):
        certify(problem, first, contiguous=False, time_limit_s=time_limit_s)


def test_a_load_of_nothing_is_optimal() -> None:
    assert Certificate(lower_bound=0.0, objective=0.0).proven_optimal
