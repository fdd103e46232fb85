"""The best contiguous placement: exact dynamic programming over intervals of several topological orders.

Narayanan et al., *PipeDream*, SOSP 2019, §3.1, with the costs and device kinds of Tarnawski et al., NeurIPS
2020 (their DPL uses one order).

Axes: B = block, i and j = boundary of the line, before its i-th and its j-th block; K = device kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from forescale.plan.placement.atoms import Parts
from forescale.plan.placement.problem import Array, DeviceKind, IntArray

_CELLS = 3_000_000
"""Cells of interval tables that all orders together may have."""
_MOST_ORDERS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The longest load, and the device of every block."""

    load: float
    device_B: IntArray


def best_line(
    parts: Parts, edges: Sequence[tuple[int, int]], kinds: Sequence[DeviceKind], rng: np.random.Generator
) -> Placed:
    """The best of all intervals over several orders; an infinite load if none fits."""
    count = min(max(_CELLS // parts.count**2, 1), _MOST_ORDERS)
    seen: set[tuple[int, ...]] = set()
    best: Placed | None = None
    for order in _orders(parts.count, edges, count, rng):
        if tuple(order) in seen:
            continue
        seen.add(tuple(order))
        placed = _place_along(parts, order, kinds)
        if best is None or placed.load < best.load:
            best = placed
    assert best is not None, "there is at least one order"
    return best


def _orders(
    count: int, edges: Sequence[tuple[int, int]], wanted: int, rng: np.random.Generator
) -> Iterator[list[int]]:
    """Topological orders, in turn depth first (few tensors cross a boundary), at random, breadth first."""
    readers: list[list[int]] = [[] for _ in range(count)]
    sources = [0] * count
    for source, target in edges:
        readers[source].append(target)
        sources[target] += 1
    for number in range(wanted):
        missing = sources.copy()
        ready = [block for block in range(count) if not missing[block]]
        rng.shuffle(ready)
        order: list[int] = []
        while ready:
            turn = (len(ready) - 1, int(rng.integers(len(ready))), 0)[number % 3]
            block = ready.pop(turn)
            order.append(block)
            for reader in rng.permutation(readers[block]).tolist() if readers[block] else ():
                missing[reader] -= 1
                if not missing[reader]:
                    ready.append(reader)
        yield order


def _place_along(parts: Parts, order: Sequence[int], kinds: Sequence[DeviceKind]) -> Placed:
    """Exact over all cuts of one line and all sequences of device kinds."""
    load_Kij = _interval_loads(parts, order, kinds)
    states = list(product(*(range(kind.count + 1) for kind in kinds)))
    start = states[0]
    best_Sj: dict[tuple[int, ...], Array] = {start: np.full(len(order) + 1, np.inf)}
    best_Sj[start][0] = 0.0
    choice_Sj: dict[tuple[int, ...], tuple[IntArray, IntArray]] = {}
    for state in states[1:]:
        rows: list[Array] = []
        cuts: list[IntArray] = []
        for kind, used in enumerate(state):
            if not used:
                rows.append(np.full(len(order) + 1, np.inf))
                cuts.append(np.zeros(len(order) + 1, dtype=np.int64))
                continue
            before = (*state[:kind], used - 1, *state[kind + 1 :])
            reached_ij = np.maximum(best_Sj[before][:, None], load_Kij[kind])
            cut_j = reached_ij.argmin(axis=0)
            cuts.append(cut_j)
            rows.append(reached_ij[cut_j, np.arange(len(cut_j))])
        kind_j = np.stack(rows).argmin(axis=0)
        at = np.arange(len(kind_j))
        best_Sj[state] = np.stack(rows)[kind_j, at]
        choice_Sj[state] = kind_j, np.stack(cuts)[kind_j, at]
    state = min(states, key=lambda state: best_Sj[state][-1])
    return Placed(load=float(best_Sj[state][-1]), device_B=_trace(order, kinds, state, choice_Sj))


def _trace(
    order: Sequence[int],
    kinds: Sequence[DeviceKind],
    state: tuple[int, ...],
    choice_Sj: dict[tuple[int, ...], tuple[IntArray, IntArray]],
) -> IntArray:
    device_B = np.zeros(len(order), dtype=np.int64)
    first_K = np.cumsum([0, *(kind.count for kind in kinds)])
    end = len(order) if state in choice_Sj else 0  # without a choice nothing fits
    while end:
        kind, start = (int(choice[end]) for choice in choice_Sj[state])
        state = (*state[:kind], state[kind] - 1, *state[kind + 1 :])
        device_B[list(order[start:end])] = first_K[kind] + state[kind]
        end = start
    return device_B


def _interval_loads(parts: Parts, order: Sequence[int], kinds: Sequence[DeviceKind]) -> Array:
    """Load of every interval on a device of each kind; infinite if it is empty or does not fit."""
    prefix_Kj = np.pad(np.cumsum(parts.work_KA[:, order], axis=1), ((0, 0), (1, 0)))
    memory_j = np.concatenate([[0.0], np.cumsum(parts.memory_bytes_A[list(order)])])
    transfers_ij = _interval_transfers(parts, order)
    empty_ij = np.tri(len(order) + 1, dtype=bool)
    loads: list[Array] = []
    for kind, prefix_j in zip(kinds, prefix_Kj, strict=True):
        with np.errstate(invalid="ignore"):  # infinity - infinity: a node that cannot run there came before
            load_ij = prefix_j[None, :] - prefix_j[:, None]
        if np.isinf(prefix_j[-1]):
            load_ij = _without(parts.work_KA[len(loads), order], load_ij)
        if kind.pays_transfers:
            load_ij = load_ij + transfers_ij
        too_large_ij = memory_j[None, :] - memory_j[:, None] > kind.memory_bytes
        loads.append(np.where(empty_ij | too_large_ij, np.inf, load_ij))
    return np.stack(loads)


def _without(work_B: Array, load_ij: Array) -> Array:
    """Loads where some block cannot run on the device: infinite for the intervals that hold one."""
    possible = np.isfinite(work_B)
    finite_j = np.concatenate([[0.0], np.cumsum(np.where(possible, work_B, 0.0))])
    barred_j = np.concatenate([[0], np.cumsum(~possible)])
    barred_ij = barred_j[None, :] > barred_j[:, None]
    return np.where(barred_ij, np.inf, finite_j[None, :] - finite_j[:, None]).reshape(load_ij.shape)


def _interval_transfers(parts: Parts, order: Sequence[int]) -> Array:
    """What an interval pays for tensors that it holds some but not all blocks of.

    Corners of rectangles of intervals are marked and summed up in both directions. An interval touches a
    tensor first at its block x if it begins behind the tensor's block before x, and ends behind x.
    """
    position_B = np.empty(parts.count, dtype=np.int64)
    position_B[list(order)] = np.arange(parts.count)
    corner_ij = np.zeros((parts.count + 2, parts.count + 2))
    for net in parts.nets:
        at = np.sort(position_B[list(net.nodes)])
        after_previous = np.concatenate([[0], at[:-1] + 1])
        corner_ij[after_previous, at + 1] += net.cost
        corner_ij[at + 1, at + 1] -= net.cost
        corner_ij[0, at[-1] + 1] -= net.cost
        corner_ij[at[0] + 1, at[-1] + 1] += net.cost
    return corner_ij.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
