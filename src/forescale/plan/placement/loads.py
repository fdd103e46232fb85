"""Loads and memory of the devices under an assignment, and a bound that none can go below.

Axes: as in :mod:`forescale.plan.placement.problem`; A = atom.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forescale.plan.placement.problem import Array, IntArray, Nets, PlacementProblem, sums

_ASCENTS = 400
_ASCENDING = 5000
"""Atoms on which prices are sought."""


def loads(problem: PlacementProblem, device_N: Sequence[int] | IntArray) -> Array:
    """Load of every device."""
    count = len(problem.devices)
    nets = problem.pins.labelled(np.asarray(device_N), count)
    cost_P = np.repeat(nets.cost_H, nets.size_H)
    if nets.levels is not None and len(nets):
        cost_P = nets.levels.cost_LH[_farthest(nets, nets.levels.source_H, problem.level_DD), nets.net_P]
    return work(problem, device_N) + sums(nets.node_P, cost_P, count) * problem.pays_D


def _farthest(nets: Nets, source_H: IntArray, level_DD: IntArray) -> IntArray:
    """Level of the farthest device that each device of each net exchanges it with.

    Readers have it from the producer, which sends it to all of them.
    """
    source_P = np.repeat(source_H, nets.size_H)
    level_P = level_DD[nets.node_P, source_P]
    most_H = np.maximum.reduceat(level_P, nets.start_H)
    return np.where(nets.node_P == source_P, np.repeat(most_H, nets.size_H), level_P)


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
    count = int(atom_N.max()) + 1
    work_KA = np.stack([sums(atom_N, work_N, count) for work_N in problem.work_KN[present]])
    return max(float(work_KA.min(axis=0).max()), _shared(work_KA, counts_K[present]))


def _shared(work_KA: Array, counts_K: Array) -> float:
    """The best Σₐ minₖ λₖ workₖₐ met. Of very many atoms, the way there is found on some of them."""
    price_K = np.full(len(counts_K), 1 / counts_K.sum())
    if len(counts_K) > 1 and (step := work_KA.shape[1] // _ASCENDING):
        price_K, _ = _ascend(work_KA[:, ::step], counts_K, price_K, _ASCENTS)
        return _ascend(work_KA, counts_K, price_K, 1)[1]
    return _ascend(work_KA, counts_K, price_K, _ASCENTS if len(counts_K) > 1 else 1)[1]


def _ascend(work_KA: Array, counts_K: Array, price_K: Array, ascents: int) -> tuple[Array, float]:
    """The best prices met from the first on, and Σₐ minₖ λₖ workₖₐ for them."""
    best, best_K = -np.inf, price_K
    for ascent in range(1, ascents + 1):
        with np.errstate(invalid="ignore"):
            priced_KA = np.where(np.isinf(work_KA), np.inf, price_K[:, None] * work_KA)
        chosen_A = priced_KA.argmin(axis=0)
        value = float(priced_KA.min(axis=0).sum())
        if value > best:
            best, best_K = value, price_K
        taken_K = np.bincount(chosen_A, work_KA[chosen_A, np.arange(work_KA.shape[1])], len(counts_K))
        # Multiplicative steps towards the kinds with more work per device keep the prices positive.
        busy_K = taken_K / counts_K
        price_K = price_K * np.exp(busy_K / max(busy_K.max(), 1e-300) / np.sqrt(ascent))
        price_K /= float(counts_K @ price_K)
    return best_K, best
