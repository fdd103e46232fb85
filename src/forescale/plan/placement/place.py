"""Places a graph's nodes on devices so that the longest load is short."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from forescale.core.errors import InfeasiblePlan
from forescale.plan.placement.annealing import Cooling, anneal, assignment_of
from forescale.plan.placement.atoms import Parts, atoms, blocks, merge
from forescale.plan.placement.bounds import best_bound
from forescale.plan.placement.far_line import best_far_line
from forescale.plan.placement.line import best_line
from forescale.plan.placement.loads import loads, memory_bytes, work
from forescale.plan.placement.problem import Array, IntArray, PlacementProblem
from forescale.plan.placement.refinement import refine

_WIDE = Cooling(first=0.03, last=0.00005, exponent=16)
_NARROW = Cooling(first=0.01, last=0.00005, exponent=16)
_ROUNDS = 3
_MOVES_PER_ATOM = 2000
_MOST_MOVES = 400_000
_MOST_ATOMS = 600
"""Atoms beyond which not each can be tried often enough."""
_BACKWARD_MOVES = 60_000
"""For atoms of the backward pass alone: no interval binds them."""
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """An answer.

    Attributes:
        device_N: position of each node's device in ``problem.devices``.
        objective: the longest load, in the graph's unit of time; ``lower_bound``: none can be below.
        work_D: the part of each load that is not transfers.
        start_N: if placed for latency, when each node starts; the objective is when the last one ends.
    """

    device_N: IntArray
    objective: float
    lower_bound: float
    load_D: Array
    work_D: Array
    memory_bytes_D: Array
    start_N: Array | None = None

    @property
    def gap(self) -> float:
        """How much longer the longest load may be than the best, as a fraction of the objective."""
        return 1 - self.lower_bound / self.objective if self.objective else 0.0


def place(problem: PlacementProblem, *, contiguous: bool, seed: int = _SEED) -> Placement:
    """The best placement found.

    Args:
        contiguous: whether each device holds an interval of the forward pass.

    Raises:
        InfeasiblePlan: no placement was found that fits the devices' memory.
    """
    rng = np.random.default_rng(seed)
    atom_N = atoms(problem)
    block_N, edge_XE = blocks(problem, atom_N)
    parts = merge(problem, block_N)
    if problem.unit_devices:
        line = best_far_line(problem, parts, edge_XE, rng)
    else:
        line = best_line(parts, edge_XE, problem.kinds, rng)
    if not np.isfinite(line.load):
        raise _infeasible(problem, merge(problem, atom_N))
    block_A = block_N[np.unique(atom_N, return_index=True)[1]]
    device_A = line.device_B[block_A]
    movable_A = np.ones(len(block_A), dtype=bool)
    if contiguous:
        movable_A[atom_N[~problem.backward_N]] = False
    if movable_A.sum() > _MOST_ATOMS:
        along_A = np.argsort(line.order_B)[block_A]
        device_A = refine(problem, atom_N, device_A, along_A, movable_A, rng)
    elif movable_A.any():
        device_A = _annealed(problem, atom_N, device_A, np.flatnonzero(movable_A), rng)
    placed = placed_as(problem, device_A[atom_N], lower_bound=0.0)
    return replace(placed, lower_bound=best_bound(problem, merge(problem, atom_N), placed.objective))


def placed_as(problem: PlacementProblem, device_N: IntArray, *, lower_bound: float) -> Placement:
    """What an assignment of devices costs."""
    load_D = loads(problem, device_N)
    return Placement(
        device_N=device_N,
        objective=float(load_D.max()),
        lower_bound=lower_bound,
        load_D=load_D,
        work_D=work(problem, device_N),
        memory_bytes_D=memory_bytes(problem, device_N),
    )


def _annealed(
    problem: PlacementProblem,
    atom_N: IntArray,
    device_A: IntArray,
    movable: IntArray,
    rng: np.random.Generator,
) -> IntArray:
    """The best of some walks, and of one more from there. Few atoms, of a backward pass, need one."""
    parts = merge(problem, atom_N)
    everything = len(movable) == parts.count
    rounds = _ROUNDS if everything else 1
    moves = min(_MOVES_PER_ATOM * parts.count, _MOST_MOVES) if everything else _BACKWARD_MOVES
    walks = [
        anneal(
            assignment_of(problem, parts, device_A.tolist()),
            parts,
            movable.tolist(),
            moves=moves,
            cooling=_WIDE,
            rng=rng,
        )
        for _ in range(rounds)
    ]
    last = assignment_of(problem, parts, min(walks)[1])
    return np.array(anneal(last, parts, movable.tolist(), moves=moves, cooling=_NARROW, rng=rng)[1])


def _infeasible(problem: PlacementProblem, parts: Parts) -> InfeasiblePlan:
    """Why: a part that fits nowhere, or too little memory in all."""
    kinds = [kind for kind in problem.kinds if kind.count]
    largest = max(kinds, key=lambda kind: kind.memory_bytes)
    atom = int(parts.memory_bytes_A.argmax())
    needed_bytes = float(parts.memory_bytes_A[atom])
    if needed_bytes > largest.memory_bytes:
        node = problem.nodes[int(np.flatnonzero(parts.part_N == atom)[0])]
        fits = f"node {node} and what must be with it need {needed_bytes:,.0f} bytes on one device"
        return InfeasiblePlan(
            short_bytes=math.ceil(needed_bytes - largest.memory_bytes),
            device=f"{largest.name}0",
            fits=fits,
        )
    all_bytes = float(problem.memory_bytes_N.sum())
    there_bytes = sum(kind.count * kind.memory_bytes for kind in kinds)
    return InfeasiblePlan(
        short_bytes=max(math.ceil(all_bytes - there_bytes), 1),
        device=f"{largest.name}0",
        fits=f"the graph needs {all_bytes:,.0f} bytes; give more devices, or more memory to each",
    )
