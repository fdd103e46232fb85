"""The best of our bounds that need no solver: shared work, transfers of single atoms, and whole atoms.

Axes: A = atom, K = device kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations

import numpy as np

from forescale.plan.placement.atoms import Parts
from forescale.plan.placement.cuts import transfer_bound
from forescale.plan.placement.loads import lower_bound
from forescale.plan.placement.problem import DeviceKind, PlacementProblem

_MOST_KINDS = 8
"""Of which all subsets are looked at."""


def best_bound(problem: PlacementProblem, parts: Parts, objective: float) -> float:
    """A load that some device has under every assignment.

    Args:
        parts: atoms of the problem.
        objective: the longest load of any placement that fits; the bound is never more.
    """
    bounds = (
        lower_bound(problem, parts.part_N),
        transfer_bound(parts, problem.kinds),
        packing_bound(parts, problem.kinds, objective),
    )
    return min(max(bounds), objective)


def packing_bound(parts: Parts, kinds: Sequence[DeviceKind], objective: float) -> float:
    """Of q m + 1 atoms, some one of m devices has q + 1 (the bound of jobs on equal machines).

    For every choice of kinds, of the atoms that no other device runs in less than ``objective``. Transfers
    are left out; at most ``objective``.
    """
    present = [number for number, kind in enumerate(kinds) if kind.count]
    if len(present) > _MOST_KINDS:
        return 0.0
    work_KA = parts.work_KA[present]
    able_KA = work_KA < objective
    best = 0.0
    for chosen in chain.from_iterable(combinations(range(len(present)), n + 1) for n in range(len(present))):
        others = [kind for kind in range(len(present)) if kind not in chosen]
        bound_A = ~able_KA[others].any(axis=0)
        ascending = np.sort(work_KA[list(chosen)][:, bound_A].min(axis=0))
        longest_first = np.minimum(ascending[::-1], objective)
        devices = sum(kinds[present[kind]].count for kind in chosen)
        q = np.arange((len(longest_first) - 1) // devices + 1)
        total = np.concatenate([[0.0], np.cumsum(longest_first)])
        if len(q):
            best = max(best, float((total[q * devices + 1] - total[q * (devices - 1)]).max()))
    return min(best, objective)
