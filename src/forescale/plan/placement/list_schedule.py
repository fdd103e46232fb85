"""When every node runs if one sample goes through the graph, and nothing else is there.

A device runs one node at a time. A tensor leaves as soon as it is made and takes its cost to reach another
device, unless neither of the two pays for transfers; meanwhile both go on computing, and links carry any
number of tensors at once. HEFT: Topcuoglu, Hariri and Wu, *Performance-Effective and Low-Complexity Task
Scheduling for Heterogeneous Computing*, IEEE TPDS 13(3), 2002.

Axes: N = node, D = device, H = net, L = level of links.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forescale.plan.placement.problem import IntArray, PlacementProblem, order_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When nodes start and end.

    Attributes:
        chain: nodes from the first to the last that ends, each of which waited for the one before it: for its
            output, or for its device.
    """

    start_N: list[float]
    end_N: list[float]
    chain: list[int]

    @property
    def latency(self) -> float:
        return max(self.end_N)


class _Calendar:
    """What one device runs, in order."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.nodes: list[int] = []

    def earliest(self, ready: float, duration: float) -> tuple[float, int]:
        """The first gap that is long enough: when, and before which entry."""
        starts, ends = self.starts, self.ends
        if not ends or ready >= ends[-1]:
            return ready, len(ends)
        at = bisect_right(ends, ready)
        while at < len(ends) and starts[at] < ready + duration:
            ready = max(ready, ends[at])
            at += 1
        return ready, at

    def add(self, node: int, start: float, end: float, at: int) -> None:
        self.starts.insert(at, start)
        self.ends.insert(at, end)
        self.nodes.insert(at, node)


class Timetable:
    """Schedules of one problem's assignments."""

    def __init__(self, problem: PlacementProblem) -> None:
        count = len(problem.nodes)
        self.order = order_of(count, problem.edge_XE.T, problem.nodes)
        self._work_ND: list[list[float]] = problem.work_KN.T[:, problem.kind_D].tolist()
        pays_D = problem.pays_D
        level_DD = np.where(pays_D[:, None] | pays_D, problem.level_DD, -1)
        np.fill_diagonal(level_DD, -1)
        self._level_DD: list[list[int]] = level_DD.tolist()
        # The last cost is that of no transfer, at level -1.
        self._inputs_N: list[list[tuple[int, tuple[float, ...]]]] = [[] for _ in range(count)]
        self._readers_N: list[list[tuple[int, tuple[float, ...]]]] = [[] for _ in range(count)]
        for net in problem.nets:
            source, *readers = net.nodes
            cost_L = (net.cost, *net.far_costs, 0.0)
            for reader in readers:
                self._inputs_N[reader].append((source, cost_L))
                self._readers_N[source].append((reader, cost_L))
        self.size = count + sum(map(len, self._inputs_N))

    def schedule(self, device_N: Sequence[int]) -> Schedule:
        """List scheduling with insertion, nodes with the longest way to the end first."""
        calendars = [_Calendar() for _ in self._level_DD]
        count = len(device_N)
        start_N, end_N, waited_N = [0.0] * count, [0.0] * count, [-1] * count
        for node in self._by_rank(device_N):
            device = device_N[node]
            ready, waited = self._ready(node, device, device_N, end_N)
            duration = self._work_ND[node][device]
            calendar = calendars[device]
            start, at = calendar.earliest(ready, duration)
            waited_N[node] = calendar.nodes[at - 1] if start > ready else waited
            calendar.add(node, start, start + duration, at)
            start_N[node], end_N[node] = start, start + duration
        chain = [max(range(count), key=end_N.__getitem__)]
        while waited_N[chain[-1]] >= 0:
            chain.append(waited_N[chain[-1]])
        return Schedule(start_N=start_N, end_N=end_N, chain=chain[::-1])

    def _by_rank(self, device_N: Sequence[int]) -> list[int]:
        """Nodes by the time from their start to the end of the last, if nothing waits for a device."""
        rank_N = [0.0] * len(device_N)
        for node in reversed(self.order):
            device = device_N[node]
            level_D = self._level_DD[device]
            rest = 0.0
            for reader, cost_L in self._readers_N[node]:
                rest = max(rest, cost_L[level_D[device_N[reader]]] + rank_N[reader])
            rank_N[node] = rest + self._work_ND[node][device]
        return sorted(self.order, key=lambda node: -rank_N[node])

    def _ready(
        self, node: int, device: int, device_N: Sequence[int], end_N: Sequence[float]
    ) -> tuple[float, int]:
        """When the node's inputs are on a device, and the producer of the last; -1 if it has none."""
        ready, waited = 0.0, -1
        level_D = self._level_DD[device]
        for source, cost_L in self._inputs_N[node]:
            arrival = end_N[source] + cost_L[level_D[device_N[source]]]
            if arrival >= ready:
                ready, waited = arrival, source
        return ready, waited

    def heft(
        self, atom_N: IntArray, memory_bytes_A: Sequence[float], capacity_D: Sequence[float]
    ) -> list[int] | None:
        """Every node, with the rest of its atom, where it ends first; None if an atom then fits nowhere."""
        atom_of = atom_N.tolist()
        device_A = [-1] * len(memory_bytes_A)
        barred_AD = [[False] * len(capacity_D) for _ in memory_bytes_A]
        for node, work_D in enumerate(self._work_ND):
            for device, work in enumerate(work_D):
                barred_AD[atom_of[node]][device] |= math.isinf(work)
        free_D = list(capacity_D)
        calendars = [_Calendar() for _ in capacity_D]
        device_N, end_N = [0] * len(atom_of), [0.0] * len(atom_of)
        for node in self._by_mean_rank():
            atom = atom_of[node]
            able = [device_A[atom]]
            if able == [-1]:
                needed = memory_bytes_A[atom]
                able = [d for d, free in enumerate(free_D) if needed <= free and not barred_AD[atom][d]]
            best: tuple[float, float, int, int] | None = None
            for device in able:
                ready, _ = self._ready(node, device, device_N, end_N)
                work = self._work_ND[node][device]
                start, at = calendars[device].earliest(ready, work)
                if best is None or start + work < best[0]:
                    best = start + work, start, device, at
            if best is None:
                return None
            end_N[node], start, device, at = best
            device_N[node] = device
            calendars[device].add(node, start, end_N[node], at)
            if device_A[atom] < 0:
                device_A[atom] = device
                free_D[device] -= memory_bytes_A[atom]
        return device_N

    def _by_mean_rank(self) -> list[int]:
        """As HEFT: by means over the devices that can run a node, and over pairs of devices."""
        count = len(self._level_DD)
        share = Counter(self._level_DD[a][b] for a in range(count) for b in range(count) if a != b)
        pairs = share.total() or 1
        rank_N = [0.0] * len(self._work_ND)
        for node in reversed(self.order):
            able = [work for work in self._work_ND[node] if work < math.inf]
            rest = 0.0
            for reader, cost_L in self._readers_N[node]:
                mean = sum(times * cost_L[level] for level, times in share.items()) / pairs
                rest = max(rest, mean + rank_N[reader])
            rank_N[node] = rest + sum(able) / len(able)
        return sorted(self.order, key=lambda node: -rank_N[node])
