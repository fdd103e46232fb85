"""The best contiguous placement: exact dynamic programming over intervals of several topological orders.

Narayanan et al., *PipeDream*, SOSP 2019, §3.1, with the costs and device kinds of Tarnawski et al., NeurIPS
2020 (their DPL uses one order). A long line is first cut only where it is narrow, then again with more
places to cut around the cuts found: the same exact programme every time, with all tensors' true costs.

Axes: B = block, i and j = boundary of the line at which it may be cut; o = offset before j;
K = device kind; S = number of devices used of each kind; P = pin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from forescale.plan.placement.atoms import Parts
from forescale.plan.placement.coarsening import around, everywhere
from forescale.plan.placement.problem import Array, DeviceKind, IntArray, readers_of, sums

_CELLS = 3_000_000
"""Cells of interval tables that all orders together may have."""
_FEWEST_ORDERS, _MOST_ORDERS = 4, 100
_MOST_BOUNDARIES = 1000
_PER_DEVICE = 12
"""Boundaries that a long line has at least for each device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The longest load, the device of every block, and the blocks along the line."""

    load: float
    device_B: IntArray
    order_B: IntArray


def best_line(
    parts: Parts, edge_XE: IntArray, kinds: Sequence[DeviceKind], rng: np.random.Generator
) -> Placed:
    """The best of all intervals over several orders; an infinite load if none fits."""
    most = max(_MOST_BOUNDARIES, _PER_DEVICE * sum(kind.count for kind in kinds))
    count = min(max(_CELLS // parts.count**2, _FEWEST_ORDERS), _MOST_ORDERS)
    states = list(product(*(range(kind.count + 1) for kind in kinds)))
    seen: set[bytes] = set()
    best: tuple[float, Line, list[Interval]] | None = None
    for order_B in orders(parts.count, edge_XE, count, rng, long=parts.count > most):
        if order_B.tobytes() in seen:
            continue
        seen.add(order_B.tobytes())
        line = Line(parts, order_B, kinds)
        # What fills one device after the other fits, where narrow boundaries may be too far apart.
        cut_j = np.union1d(everywhere(line.crossing_j, line.weight_j, most), line.filled())
        load, intervals = _cut(line, cut_j, states)
        if best is None or load < best[0]:
            best = load, line, intervals
    assert best is not None, "there is at least one order"
    load, line, intervals = best
    spacing = parts.count // most if intervals and parts.count > most else 0
    while spacing:
        cut_j = np.array([end for _, end, _ in intervals])
        states = _along(intervals, kinds)
        load, intervals = _cut(line, around(cut_j, line.crossing_j, 2 * spacing, most), states)
        spacing = min(4 * spacing * len(cut_j) // most, spacing // 2)
    device_B = np.zeros(parts.count, dtype=np.int64)
    for start, end, device in intervals:
        device_B[line.order_B[start:end]] = device
    return Placed(load=load, device_B=device_B, order_B=line.order_B)


def orders(
    count: int, edge_XE: IntArray, wanted: int, rng: np.random.Generator, *, long: bool
) -> Iterator[IntArray]:
    """Topological orders: as listed, if that is one; then in turn depth first, breadth first, at random.

    Args:
        long: none at random, for many tensors cross a boundary there.
    """
    if (edge_XE[0] < edge_XE[1]).all():
        yield np.arange(count)
    sources = np.bincount(edge_XE[1], minlength=count).tolist()
    for number in range(wanted):
        kind = number % (2 if long else 3)
        readers = readers_of(count, edge_XE[:, rng.permutation(edge_XE.shape[1])])
        missing = sources.copy()
        first = [block for block in range(count) if not missing[block]]
        rng.shuffle(first)
        ready = deque(first)
        order: list[int] = []
        while ready:
            if kind:
                ready.rotate(-1 if kind == 1 else int(rng.integers(len(ready))))
            order.append(block := ready.pop())
            for reader in readers[block]:
                missing[reader] -= 1
                if not missing[reader]:
                    ready.append(reader)
        yield np.array(order)


Interval = tuple[int, int, int]
"""First block, the block behind the last, device."""


class Line:
    """Blocks in an order, with what intervals of them cost."""

    def __init__(self, parts: Parts, order_B: IntArray, kinds: Sequence[DeviceKind]) -> None:
        self.order_B = order_B
        self.kinds = kinds
        work_KB = parts.work_KA[:, order_B]
        self._barred_Kj = _prefix(np.isinf(work_KB))
        self._work_Kj = _prefix(np.where(np.isinf(work_KB), 0.0, work_KB))
        self._memory_j = _prefix(parts.memory_bytes_A[order_B])
        position_B = np.empty(parts.count, dtype=np.int64)
        position_B[order_B] = np.arange(parts.count)
        nets = parts.nets
        key_P = np.sort(nets.net_P * parts.count + position_B[nets.node_P])
        self._net_P, self._at_P = np.divmod(key_P, parts.count)
        self._cost_H = nets.cost_H
        last_H = np.cumsum(nets.size_H) - 1
        opened_j = sums(self._at_P[nets.start_H] + 1, nets.cost_H, parts.count + 1)
        closed_j = sums(self._at_P[last_H] + 1, nets.cost_H, parts.count + 1)
        self.crossing_j = np.cumsum(opened_j - closed_j)
        """What all tensors cost that cross a boundary."""
        fastest_B = np.min(work_KB[[kind.count > 0 for kind in kinds]], axis=0)
        self.weight_j = _prefix(fastest_B)

    def filled(self) -> IntArray:
        """Ends of intervals that fill the memory of one device after the other."""
        ends = [0]
        for kind in self.kinds:
            for _ in range(kind.count):
                most_bytes = self._memory_j[ends[-1]] + kind.memory_bytes
                ends.append(int(np.searchsorted(self._memory_j, most_bytes, side="right")) - 1)
        return np.array(ends)

    def loads(self, cut_j: IntArray) -> Array:
        """Load of every interval between some boundaries, on a device of each kind.

        Infinite if it is empty or does not fit.
        """
        load_Kij = self.work(cut_j)
        load_Kij[[kind.pays_transfers for kind in self.kinds]] += self.transfers(cut_j)
        return load_Kij

    def work(self, cut_j: IntArray) -> Array:
        """The loads without transfers."""
        memory_j = self._memory_j[cut_j]
        empty_ij = np.tri(len(cut_j), dtype=bool)
        load_Kij = np.empty((len(self.kinds), *empty_ij.shape))
        for number, kind in enumerate(self.kinds):
            work_j, barred_j = self._work_Kj[number, cut_j], self._barred_Kj[number, cut_j]
            load_ij = work_j[None, :] - work_j[:, None]
            excluded_ij = empty_ij | (memory_j[None, :] - memory_j[:, None] > kind.memory_bytes)
            excluded_ij |= barred_j[None, :] > barred_j[:, None]
            load_Kij[number] = np.where(excluded_ij, np.inf, load_ij)
        return load_Kij

    def transfers(self, cut_j: IntArray) -> Array:
        """What an interval pays for tensors that it holds some but not all blocks of.

        Corners of rectangles of intervals are marked and summed up in both directions. An interval touches a
        tensor first at its segment x if it begins behind the tensor's segment before x, and ends behind x.
        """
        cost_P, at_P, first_P, last_P = self._segments(cut_j)
        behind_previous_P = np.where(first_P, 0, np.roll(at_P, 1) + 1)
        end_P = at_P + 1
        size = len(cut_j) + 1
        marks = (
            (behind_previous_P * size + end_P, cost_P),
            (end_P * size + end_P, -cost_P),
            (end_P[last_P], -cost_P[last_P]),
            (end_P[first_P] * size + end_P[last_P], cost_P[last_P]),
        )
        return _summed(marks, size)

    def sent(self, cut_j: IntArray) -> Array:
        """The part of it that an interval pays for tensors of its own."""
        cost_P, at_P, first_P, last_P = self._segments(cut_j)
        cost_H, made_H, read_H = cost_P[first_P], at_P[first_P] + 1, at_P[last_P] + 1
        size = len(cut_j) + 1
        marks = (
            (made_H, cost_H),
            (read_H, -cost_H),
            (made_H * size + made_H, -cost_H),
            (made_H * size + read_H, cost_H),
        )
        return _summed(marks, size)

    def _segments(
        self, cut_j: IntArray
    ) -> tuple[Array, IntArray, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Segments between boundaries with a pin of each net: its cost, which, and if the first or last."""
        segment_B = np.repeat(np.arange(len(cut_j) - 1), np.diff(cut_j))
        net_P, at_P = self._net_P, segment_B[self._at_P]
        again_P = np.zeros(len(net_P), dtype=bool)
        again_P[1:] = (net_P[1:] == net_P[:-1]) & (at_P[1:] == at_P[:-1])
        net_P, at_P = net_P[~again_P], at_P[~again_P]
        first_P = np.ones(len(net_P), dtype=bool)
        first_P[1:] = net_P[1:] != net_P[:-1]
        return self._cost_H[net_P], at_P, first_P, np.roll(first_P, -1)


def _summed(marks: Iterable[tuple[IntArray, Array]], size: int) -> Array:
    """Sums of marked corners in both directions, between the boundaries."""
    corner_ij = np.zeros(size * size)
    for at_X, cost_X in marks:
        corner_ij += sums(at_X, cost_X, size * size)
    corner_ij = corner_ij.reshape(size, size)
    return corner_ij.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]


def _prefix(value_XB: npt.NDArray[Any]) -> Array:
    """Sums of the values before each boundary."""
    return np.insert(np.cumsum(value_XB, axis=-1, dtype=np.float64), 0, 0.0, axis=-1)


def _along(intervals: Sequence[Interval], kinds: Sequence[DeviceKind]) -> list[tuple[int, ...]]:
    """The states that a solution passes through."""
    kind_D = np.repeat(np.arange(len(kinds)), [kind.count for kind in kinds])
    kind_S = kind_D[[device for *_, device in reversed(intervals)]]
    used_SK = np.cumsum(np.eye(len(kinds), dtype=np.int64)[kind_S], axis=0)
    return [(0,) * len(kinds), *map(tuple, used_SK.tolist())]


def _cut(line: Line, cut_j: IntArray, states: Sequence[tuple[int, ...]]) -> tuple[float, list[Interval]]:
    """Exact over all choices of some boundaries and all sequences of kinds through some states."""
    kinds = line.kinds
    load_Kjo = _before(line.loads(cut_j), line.weight_j[cut_j], kinds)
    width = load_Kjo.shape[2]
    nowhere_j = np.full(width + len(cut_j), np.inf)  # begins before the line, so that every window is as wide
    best_Sj = {states[0]: nowhere_j.copy()}
    best_Sj[states[0]][width] = 0.0
    choice_Sj: dict[tuple[int, ...], tuple[IntArray, IntArray]] = {}
    at_j = np.arange(len(cut_j))
    for state in states[1:]:
        load_j = np.full(len(cut_j), np.inf)
        kind_j, start_j = np.zeros_like(at_j), np.zeros_like(at_j)
        for kind, used in enumerate(state):
            before_j = best_Sj.get((*state[:kind], used - 1, *state[kind + 1 :]))
            if before_j is None:
                continue
            reached_jo = np.maximum(sliding_window_view(before_j[:-1], width), load_Kjo[kind])
            offset_j = reached_jo.argmin(axis=1)
            reached_j = reached_jo[at_j, offset_j]
            better_j = reached_j < load_j
            load_j[better_j], kind_j[better_j] = reached_j[better_j], kind
            start_j[better_j] = (at_j + offset_j - width)[better_j]
        best_Sj[state] = nowhere_j.copy()
        best_Sj[state][width:] = load_j
        choice_Sj[state] = kind_j, start_j
    state = min(states, key=lambda state: best_Sj[state][-1])
    return float(best_Sj[state][-1]), _trace(cut_j, kinds, state, choice_Sj)


def _before(load_Kij: Array, weight_j: Array, kinds: Sequence[DeviceKind]) -> Array:
    """Loads of the intervals behind each boundary's predecessors, as far back as may be of use.

    No interval is whose load is above the longest one of an even split.
    """
    most = max(range(len(kinds)), key=lambda kind: kinds[kind].count)
    even = np.linspace(0.0, weight_j[-1], kinds[most].count + 1)
    even_j = np.unique([0, *np.searchsorted(weight_j, even[1:-1]), len(weight_j) - 1])
    limit = load_Kij[most, even_j[:-1], even_j[1:]].max()
    from_i, to_j = np.nonzero((load_Kij <= limit).any(axis=0))
    width = int((to_j - from_i).max()) if limit < np.inf else len(weight_j) - 1
    at_jo = np.arange(len(weight_j))[:, None] + np.arange(-width, 0)
    load_Kjo = load_Kij[:, np.maximum(at_jo, 0), np.arange(len(weight_j))[:, None]]
    load_Kjo[:, at_jo < 0] = np.inf
    return load_Kjo


def _trace(
    cut_j: IntArray,
    kinds: Sequence[DeviceKind],
    state: tuple[int, ...],
    choice_Sj: dict[tuple[int, ...], tuple[IntArray, IntArray]],
) -> list[Interval]:
    """The intervals, from the last to the first; none if nothing fits."""
    intervals: list[Interval] = []
    first_K = np.cumsum([0, *(kind.count for kind in kinds)]).tolist()
    end = len(cut_j) - 1 if state in choice_Sj else 0
    while end:
        kind, start = (int(choice[end]) for choice in choice_Sj[state])
        state = (*state[:kind], state[kind] - 1, *state[kind + 1 :])
        intervals.append((int(cut_j[start]), int(cut_j[end]), first_K[kind] + state[kind]))
        end = start
    return intervals
