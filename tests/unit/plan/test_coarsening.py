"""Planning of graphs too large for exact planning: against the exact answer, and with arrays for objects."""

from __future__ import annotations

import numpy as np
import pytest

from forescale.core.errors import InfeasiblePlan, InvalidInput
from forescale.plan.placement import line as exact
from forescale.plan.placement.atoms import atoms, blocks, merge
from forescale.plan.placement.coarsening import around, everywhere, pieces
from forescale.plan.placement.line import best_line
from forescale.plan.placement.loads import loads
from forescale.plan.placement.place import place
from forescale.plan.placement.problem import DeviceKind, Net, Nets, PlacementProblem
from forescale.plan.placement.refinement import refine

UNLIMITED = DeviceKind(name="acc", count=5, memory_bytes=np.inf, pays_transfers=True)


def residual_blocks(count: int, *kinds: DeviceKind, cost: float = 1.0) -> PlacementProblem:
    """A chain in which every tenth node is also read ten nodes later, with noise."""
    rng = np.random.default_rng(0)
    cost_N = cost * rng.uniform(0.5, 5.0, count)
    nets = [
        Net(cost=cost_N[n], nodes=(n, n + 1, n + 10) if n % 10 == 0 and n + 10 < count else (n, n + 1))
        for n in range(count - 1)
    ]
    work_N = rng.uniform(0.1, 2.0, count)
    return PlacementProblem(
        nodes=tuple(map(str, range(count))),
        work_KN=np.stack([work_N * (1 + 2 * number) for number in range(len(kinds))]),
        memory_bytes_N=np.ones(count),
        nets=nets,
        together=(),
        backward_N=np.zeros(count, dtype=bool),
        kinds=kinds,
    )


def line_load(problem: PlacementProblem) -> float:
    parts = merge(problem, np.arange(len(problem.nodes)))
    return best_line(parts, problem.edge_XE, problem.kinds, np.random.default_rng(0)).load


def test_cuts_refined_are_nearly_as_good_as_all_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = DeviceKind(name="slow", count=2, memory_bytes=np.inf, pays_transfers=False)
    problem = residual_blocks(900, UNLIMITED, slower)
    best = line_load(problem)
    monkeypatch.setattr(exact, "_MOST_BOUNDARIES", 90)
    refined = line_load(problem)
    assert best <= refined + 1e-9
    assert refined < 1.02 * best


def test_a_line_that_just_fits_is_found_between_wide_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """900 bytes on 5 devices of 180: only one choice of cuts fits."""
    monkeypatch.setattr(exact, "_MOST_BOUNDARIES", 70)
    kind = DeviceKind(name="acc", count=5, memory_bytes=180, pays_transfers=True)
    placement = place(residual_blocks(900, kind), contiguous=True)
    assert placement.memory_bytes_D.tolist() == [180] * 5


def test_a_large_graph_keeps_to_order_memory_and_groups() -> None:
    kind = DeviceKind(name="acc", count=8, memory_bytes=420, pays_transfers=True)
    problem = residual_blocks(3000, kind)
    placement = place(problem, contiguous=True)
    source_E, reader_E = placement.device_N[problem.edge_XE]
    assert (source_E <= reader_E).all()  # devices of one kind are numbered along the line
    assert (placement.memory_bytes_D <= 420).all()
    assert placement.objective == pytest.approx(loads(problem, placement.device_N).max())
    assert placement.objective < 1.05 * placement.lower_bound


def test_a_large_graph_placed_freely_is_no_worse() -> None:
    problem = residual_blocks(3000, DeviceKind(name="acc", count=8, memory_bytes=420, pays_transfers=True))
    free = place(problem, contiguous=False)
    assert free.objective <= place(problem, contiguous=True).objective
    assert (free.memory_bytes_D <= 420).all()


def test_refinement_moves_only_what_may_move() -> None:
    problem = residual_blocks(2000, UNLIMITED, cost=0.01)
    device_A = np.arange(2000) // 400
    device_A[700:] = 2  # far from even: much is to be gained
    movable_A = np.arange(2000) >= 400
    refined_A = refine(
        problem, np.arange(2000), device_A, np.arange(2000), movable_A, np.random.default_rng(0)
    )
    assert (refined_A[:400] == device_A[:400]).all()
    assert loads(problem, refined_A).max() < 0.5 * loads(problem, device_A).max()


def test_a_large_backward_pass_follows_its_forward_pass() -> None:
    """Backward nodes without groups, more than are annealed one by one."""
    count = 800
    forward = residual_blocks(count, UNLIMITED)
    nets = [
        *forward.nets,
        *(Net(cost=3.0, nodes=(n, count + n)) for n in range(count)),
        *(Net(cost=1.0, nodes=(count + n, count + n - 1)) for n in range(1, count)),
    ]
    problem = PlacementProblem(
        nodes=tuple(map(str, range(2 * count))),
        work_KN=np.tile(forward.work_KN, 2),
        memory_bytes_N=np.ones(2 * count),
        nets=nets,
        together=(),
        backward_N=np.repeat([False, True], count),
        kinds=(UNLIMITED,),
    )
    placement = place(problem, contiguous=True)
    source_E, reader_E = placement.device_N[problem.edge_XE[:, (problem.edge_XE < count).all(axis=0)]]
    assert (source_E <= reader_E).all()
    assert placement.objective < 1.05 * placement.lower_bound


def test_nets_in_arrays_are_the_nets() -> None:
    nets = (Net(cost=1.0, nodes=(0, 1, 2)), Net(cost=2.0, nodes=(1, 2)), Net(cost=4.0, nodes=(2, 1)))
    arrays = Nets.of(nets)
    assert tuple(arrays) == nets
    assert arrays[1] == nets[1]
    assert arrays[1:] == nets[1:]
    labelled = arrays.labelled(np.array([7, 3, 3]), 8)
    assert tuple(labelled) == (Net(cost=1.0, nodes=(3, 7)),)
    bundled = arrays.labelled(np.array([0, 1, 2]), 3).bundled()
    assert tuple(bundled) == (Net(cost=6.0, nodes=(1, 2)), Net(cost=1.0, nodes=(0, 1, 2)))
    assert len(Nets.of(()).bundled()) == 0


def test_a_cycle_in_arrays_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"cycle through or before node n[12]"):
        PlacementProblem(
            nodes=("n0", "n1", "n2"),
            work_KN=np.ones((1, 3)),
            memory_bytes_N=np.ones(3),
            nets=Nets(cost_H=np.ones(3), size_H=np.full(3, 2), node_P=np.array([0, 1, 1, 2, 2, 1])),
            together=(),
            backward_N=np.zeros(3, dtype=bool),
            kinds=(UNLIMITED,),
        )


def test_boundaries_are_the_narrowest_of_their_share() -> None:
    crossing_j = np.array([0.0, 9, 2, 9, 9, 9, 1, 9, 0])
    weight_j = np.arange(9.0)
    assert everywhere(crossing_j, weight_j, 100).tolist() == list(range(9))
    assert everywhere(crossing_j, weight_j, 2).tolist() == [0, 2, 6, 8]
    assert around(np.array([4]), crossing_j, 2, 2).tolist() == [0, 2, 4, 6, 8]


def test_pieces_stay_on_one_device_and_together_on_the_line() -> None:
    device_A = np.array([0, 1, 0, 1, 0, 0])
    along_A = np.array([5, 4, 3, 2, 1, 0])
    piece_A = pieces(along_A, device_A, np.ones(6), 3)
    assert piece_A.tolist() == [1, 2, 1, 2, 0, 0]


def test_a_block_of_a_cycle_between_groups_stays_whole() -> None:
    """Groups (0, 3) and (1, 4) need each other's results."""
    problem = residual_blocks(6, UNLIMITED)
    problem = PlacementProblem(
        nodes=problem.nodes,
        work_KN=problem.work_KN,
        memory_bytes_N=problem.memory_bytes_N,
        nets=problem.nets,
        together=((0, 3), (1, 4)),
        backward_N=problem.backward_N,
        kinds=problem.kinds,
    )
    block_N, edge_XE = blocks(problem, atoms(problem))
    assert block_N.tolist() == [0, 0, 0, 0, 0, 1]
    assert edge_XE.T.tolist() == [[0, 1]]


def test_a_large_graph_that_cannot_fit_says_how_much_is_missing() -> None:
    kind = DeviceKind(name="acc", count=4, memory_bytes=600, pays_transfers=True)
    with pytest.raises(InfeasiblePlan) as raised:
        place(residual_blocks(2500, kind), contiguous=True)
    assert raised.value.short_bytes == 100
