"""Places a graph's nodes on devices so that the longest load is short."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from forescale.core.errors import InfeasiblePlan
from forescale.plan.placement.annealing import Assignment, Cooling, anneal
from forescale.plan.placement.atoms import Parts, atoms, blocks, merge
from forescale.plan.placement.line import best_line
from forescale.plan.placement.loads import loads, lower_bound, memory_bytes, work
from forescale.plan.placement.problem import Array, IntArray, PlacementProblem

_WIDE = Cooling(first=0.03, last=0.00005, exponent=16)
_NARROW = Cooling(first=0.01, last=0.00005, exponent=16)
_ROUNDS = 3
_MOVES_PER_ATOM = 2000
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
    """

    device_N: IntArray
    objective: float
    lower_bound: float
    load_D: Array
    work_D: Array
    memory_bytes_D: Array

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
    parts = merge(problem, atom_N)
    block_N, edges = blocks(problem, atom_N)
    line = best_line(merge(problem, block_N), edges, problem.kinds, rng)
    if not np.isfinite(line.load):
        raise _infeasible(problem, parts)
    first_A = np.unique(atom_N, return_index=True)[1]
    device_A: list[int] = line.device_B[block_N[first_A]].tolist()
    if contiguous:
        forward = set(atom_N[~problem.backward_N].tolist())
        movable = [atom for atom in range(parts.count) if atom not in forward]
        rounds, moves = 1, _BACKWARD_MOVES
    else:
        movable, rounds, moves = list(range(parts.count)), _ROUNDS, _MOVES_PER_ATOM * parts.count
    if movable:
        walks = [
            anneal(Assignment(problem, parts, device_A), parts, movable, moves=moves, cooling=_WIDE, rng=rng)
            for _ in range(rounds)
        ]
        last = Assignment(problem, parts, min(walks)[1])
        device_A = anneal(last, parts, movable, moves=moves, cooling=_NARROW, rng=rng)[1]
    device_N = np.array(device_A)[atom_N]
    load_D = loads(problem, device_N)
    return Placement(
        device_N=device_N,
        objective=float(load_D.max()),
        lower_bound=lower_bound(problem, atom_N),
        load_D=load_D,
        work_D=work(problem, device_N),
        memory_bytes_D=memory_bytes(problem, device_N),
    )


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
