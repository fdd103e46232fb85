"""Loads and memory of the devices under an assignment, and a bound that none can go below.

Axes: as in :mod:`forescale.plan.placement.problem`; A = atom.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forescale.plan.placement.problem import Array, IntArray, PlacementProblem, sums

_ASCENTS = 400


def loads(problem: PlacementProblem, device_N: Sequence[int] | IntArray) -> Array:
    """Load of every device."""
    device = np.asarray(device_N)
    load_D = work(problem, device_N)
    pays = [problem.kinds[kind].pays_transfers for kind in problem.kind_D]
    for net in problem.nets:
        touched = {int(device[node]) for node in net.nodes}
        if len(touched) > 1:
            for position in touched:
                load_D[position] += net.cost * pays[position]
    return load_D


def work(problem: PlacementProblem, device_N: Sequence[int] | IntArray) -> Array:
    """Load of every device without transfers."""
    device = np.asarray(device_N)
    work_N = problem.work_KN[problem.kind_D[device], np.arange(len(device))]
    return sums(device, work_N, len(problem.devices))


def memory_bytes(problem: PlacementProblem, device_N: Sequence[int] | IntArray) -> Array:
    """Memory of every device."""
    return sums(np.asarray(device_N), problem.memory_bytes_N, len(problem.devices))


def lower_bound(problem: PlacementProblem, atom_N: IntArray) -> float:
    """A load that some device has under every assignment, transfers left out.

    For any prices λ of the kinds' time with Σ countₖ λₖ = 1, the longest load is at least
    Σₐ minₖ λₖ workₖₐ: the dual of sharing out divisible work. The best prices are found by
    supergradient ascent (Polyak, 1969). No atom takes less than on its best device.
    """
    counts_K = np.array([kind.count for kind in problem.kinds], dtype=float)
    present = counts_K > 0
    work_KA = np.stack([np.bincount(atom_N, work_N) for work_N in problem.work_KN[present]])
    counts_K = counts_K[present]
    best = float(work_KA.min(axis=0).max())
    price_K = np.full(len(counts_K), 1 / counts_K.sum())
    for ascent in range(1, _ASCENTS + 1):
        with np.errstate(invalid="ignore"):
            priced_KA = np.where(np.isinf(work_KA), np.inf, price_K[:, None] * work_KA)
        chosen_A = priced_KA.argmin(axis=0)
        value_A = priced_KA.min(axis=0)
        best = max(best, float(value_A.sum()))
        taken_K = np.bincount(chosen_A, work_KA[chosen_A, np.arange(work_KA.shape[1])], len(counts_K))
        # Multiplicative steps towards the kinds with more work per device keep the prices positive.
        busy_K = taken_K / counts_K
        price_K = price_K * np.exp(busy_K / max(busy_K.max(), 1e-300) / np.sqrt(ascent))
        price_K /= float(counts_K @ price_K)
    return best
