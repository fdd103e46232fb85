"""How far a placement can be from the best, settled by a mixed-integer solver within a time limit.

Axes: A = atom, D = device, N = node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.plan.placement.atoms import Parts, atoms, merge
from forescale.plan.placement.bounds import best_bound
from forescale.plan.placement.forward import forward_edges
from forescale.plan.placement.loads import loads, memory_bytes
from forescale.plan.placement.place import Placement
from forescale.plan.placement.problem import IntArray, PlacementProblem

NO_SOLVER = "a certificate needs HiGHS: pip install 'forescale[plan]'"
_MOST_ATOMS = 2000
"""Beyond, the solver's bound is no better than the others in any time one would wait."""
_NEAR = 1e-5
"""A bound that near to the objective, as a fraction of it, proves it; the solver is no more exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was proven about a placement.

    Attributes:
        lower_bound: no placement's longest load is below, in the graph's unit of time.
        objective: the longest load of the best placement known.
        device_N: that placement if the solver found it, None if it did not improve the given one.
        elapsed_s: time the solver took; 0 if it was not asked.
        note: what kept the solver from being asked, if anything but a proof without it.
    """

    lower_bound: float
    objective: float
    device_N: IntArray | None = None
    elapsed_s: float = 0.0
    note: str | None = None

    @property
    def gap(self) -> float:
        """How much longer the longest load may be than the best, as a fraction of the objective."""
        return max(1 - self.lower_bound / self.objective, 0.0) if self.objective else 0.0

    @property
    def proven_optimal(self) -> bool:
        return self.gap <= _NEAR


def certify(
    problem: PlacementProblem, placement: Placement, *, contiguous: bool, time_limit_s: float = 30.0
) -> Certificate:
    """Bounds the best placement from below and looks for a better one.

    Args:
        placement: an answer that fits; if ``contiguous``, of intervals of the forward pass.
        time_limit_s: for the solver, which is not asked if simpler bounds prove the placement.

    Raises:
        InvalidInput: the solver is not installed, the time limit is not positive, or the cluster has several
            levels of links.
    """
    if not time_limit_s > 0:
        raise InvalidInput(f"the time limit must be more than 0 s, not {time_limit_s:g}")
    check_certifiable(problem)
    atom_N = atoms(problem)
    parts = merge(problem, atom_N)
    known = max(best_bound(problem, parts, placement.objective), placement.lower_bound)
    simple = Certificate(lower_bound=min(known, placement.objective), objective=placement.objective)
    if simple.proven_optimal:
        return simple
    if parts.count > _MOST_ATOMS:
        note = f"the solver was not asked: {parts.count:,} parts to place; it is of use up to {_MOST_ATOMS:,}"
        return replace(simple, note=note)
    return _solved(problem, parts, simple, contiguous=contiguous, time_limit_s=time_limit_s)


def check_certifiable(problem: PlacementProblem) -> None:
    """Whether there can be a certificate, before anything is placed.

    Raises:
        InvalidInput: the solver is not installed, or the cluster has several levels of links.
    """
    if problem.unit_devices:
        raise InvalidInput(
            "a certificate is for devices that are all as far from each other; this cluster has "
            f"{1 + len(problem.unit_devices)} levels of links"
        )
    if find_spec("highspy") is None:
        raise InvalidInput(NO_SOLVER)


def _solved(
    problem: PlacementProblem,
    parts: Parts,
    simple: Certificate,
    *,
    contiguous: bool,
    time_limit_s: float,
) -> Certificate:
    from forescale.plan.placement.program import solve  # noqa: PLC0415 - of an extra

    atom_N = parts.part_N
    solved = solve(
        parts,
        problem.kinds,
        edges=forward_edges(problem, atom_N) if contiguous else None,
        bounds=(simple.lower_bound, simple.objective),
        time_limit_s=time_limit_s,
    )
    proven = max(simple.lower_bound, solved.lower_bound)
    if solved.device_A is not None:
        device_N = solved.device_A[atom_N]
        objective = float(loads(problem, device_N).max())
        if objective < simple.objective and _fits(problem, device_N):
            return Certificate(
                lower_bound=min(proven, objective),
                objective=objective,
                device_N=device_N,
                elapsed_s=solved.elapsed_s,
            )
    return replace(simple, lower_bound=min(proven, simple.objective), elapsed_s=solved.elapsed_s)


def _fits(problem: PlacementProblem, device_N: IntArray) -> bool:
    """Exactly: the solver allows a little more."""
    capacity_D = np.array([problem.kinds[kind].memory_bytes for kind in problem.kind_D])
    return bool((memory_bytes(problem, device_N) <= capacity_D).all())
