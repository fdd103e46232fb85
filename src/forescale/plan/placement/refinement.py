"""Annealing of a graph too large for it: pieces of the line first, then ever smaller ones where devices meet.

The multilevel refinement of Karypis and Kumar (SISC 1998) with annealing in place of their passes: what is
inside a device, far from what it exchanges, stays, as one part.

Axes: N = node, A = atom, P = part: first what stays on each device, then the pieces.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from forescale.plan.placement.annealing import Cooling, anneal, assignment_of
from forescale.plan.placement.atoms import merge
from forescale.plan.placement.coarsening import pieces
from forescale.plan.placement.problem import IntArray, PlacementProblem, sums

_MOST_PIECES = 1200
_MOVES = 120_000
_TOUCHED = 1_000_000
"""Nets that all moves of a level together may touch."""
_LEVELS = 4
_COOLING = Cooling(first=0.0001, last=0.000001, exponent=128)


def refine(
    problem: PlacementProblem,
    atom_N: IntArray,
    device_A: IntArray,
    along_A: IntArray,
    movable_A: npt.NDArray[np.bool_],
    rng: np.random.Generator,
) -> IntArray:
    """A device for every atom: the longest load is at most that of ``device_A``.

    Args:
        along_A: position of each atom on a line on which neighbours exchange much.
    """
    # By the number of atoms too, so that those of no work do not become one piece.
    fastest_N = problem.work_KN[[kind.count > 0 for kind in problem.kinds]].min(axis=0)
    weight_A = sums(atom_N, fastest_N / (fastest_N.sum() or 1.0), len(device_A)) + 1 / len(device_A)
    devices = len(problem.devices)
    in_play_A = movable_A
    for _ in range(_LEVELS):
        part_A = device_A.copy()
        part_A[in_play_A] = devices + pieces(
            along_A[in_play_A], device_A[in_play_A], weight_A[in_play_A], _MOST_PIECES
        )
        parts = merge(problem, part_A[atom_N])
        parts = replace(parts, nets=parts.nets.bundled())
        device_P = np.arange(parts.count)
        device_P[part_A] = device_A
        movable = range(devices, parts.count)
        moves = min(_MOVES, _TOUCHED * parts.count // (len(parts.nets.node_P) + 1))
        start = assignment_of(problem, parts, device_P.tolist())
        device_A = np.array(anneal(start, parts, movable, moves=moves, cooling=_COOLING, rng=rng)[1])[part_A]
        cut = problem.pins.only(problem.pins.spread_H(device_A[atom_N]))
        meets_P = np.zeros(parts.count, dtype=bool)
        meets_P[part_A[atom_N[cut.node_P]]] = True
        if len(movable) == in_play_A.sum() or not (in_play_A & meets_P[part_A]).any():
            break
        in_play_A = in_play_A & meets_P[part_A]
    return device_A
