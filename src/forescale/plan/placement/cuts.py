"""A bound with transfers: what a device must hold or exchange once it holds a given atom.

The load of a device that pays for transfers is the work of its atoms and the cost of the nets it holds in
part. The least such load over all sets that contain one atom is a minimum cut (Lawler, *Cutsets and
partitions of hypergraphs*, 1973, with an edge to the sink for an atom's work), found along shortest
augmenting paths (Edmonds and Karp, 1972).

Axes: A = atom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from forescale.plan.placement.atoms import Parts
from forescale.plan.placement.problem import DeviceKind

_MOST_VISITS = 300_000
"""Nodes that searches for paths may visit, about 0.3 s of them; what has flowed by then is a bound."""
_LARGEST = 20_000
"""Ends of nets up to which cuts are quick; on larger graphs the work outweighs any one atom by far."""


def transfer_bound(parts: Parts, kinds: Sequence[DeviceKind]) -> float:
    """A load that some device has under every assignment: that of the device with the worst atom.

    Atoms that take longer than that on any device that pays for transfers share the others among them. The
    memory of the devices is left out. Zero for graphs with more than 20,000 ends of nets.
    """
    if len(parts.nets) > _LARGEST or sum(len(net.nodes) for net in parts.nets) > _LARGEST:
        return 0.0
    present = [number for number, kind in enumerate(kinds) if kind.count]
    paid = [number for number in present if kinds[number].pays_transfers]
    free = [number for number in present if not kinds[number].pays_transfers]
    free_A = parts.work_KA[free].min(axis=0, initial=math.inf).tolist()
    paid_A = parts.work_KA[paid].min(axis=0, initial=math.inf).tolist()
    alone_A = paid_A.copy()
    for net in parts.nets:
        for atom in net.nodes:
            alone_A[atom] += net.cost
    network = _Network(parts, paid_A)
    shared = sum(kinds[number].count for number in free)
    least: list[tuple[float, float]] = []
    best = 0.0
    covered: set[int] = set()
    for atom in sorted(range(parts.count), key=lambda atom: -alone_A[atom]):
        if alone_A[atom] <= best or network.visits > _MOST_VISITS:
            break
        if atom in covered:
            continue
        load, held = network.least_load(atom)
        least.append((load, free_A[atom]))
        best = _shared_bound(least, shared)
        if load <= best:  # then those it holds take no longer
            covered |= held
    return best


def _shared_bound(least: Sequence[tuple[float, float]], shared: int) -> float:
    """Bound from atoms' loads where transfers are paid and work where not, on ``shared`` devices there."""
    best = longest = total = 0.0
    for paid, free in sorted(least, reverse=True):
        total += free
        longest = max(longest, free)
        best = max(best, min(paid, max(longest, total / shared if shared else math.inf)))
    return best


class _Network:
    """Flow from one atom to the sink; every net is an edge of its cost between two nodes of its own."""

    def __init__(self, parts: Parts, work_A: list[float]) -> None:
        self._atoms = parts.count
        self._sink = parts.count + 2 * len(parts.nets)
        self._edges: list[list[int]] = [[] for _ in range(self._sink + 1)]
        self._to: list[int] = []
        self._capacity: list[float] = []
        for atom, work in enumerate(work_A):
            self._connect(atom, self._sink, work)
        for number, net in enumerate(parts.nets):
            entry = parts.count + 2 * number
            self._connect(entry, entry + 1, net.cost)
            for atom in net.nodes:
                self._connect(atom, entry, math.inf)
                self._connect(entry + 1, atom, math.inf)
        scale = max([0.0, *(net.cost for net in parts.nets), *filter(math.isfinite, work_A)])
        self._least = 1e-12 * scale
        self.visits = 0

    def _connect(self, source: int, target: int, capacity: float) -> None:
        for start, end, room in ((source, target, capacity), (target, source, 0.0)):
            self._edges[start].append(len(self._to))
            self._to.append(end)
            self._capacity.append(room)

    def least_load(self, atom: int) -> tuple[float, set[int]]:
        """The least load of a device that holds the atom, and all it then holds.

        Less, and nothing held, if too many nodes have been visited.
        """
        room = self._capacity.copy()
        total = 0.0
        while self.visits <= _MOST_VISITS:
            reached = self._paths(atom, room)
            if self._sink not in reached:
                return total, {node for node in reached if node < self._atoms}
            path: list[int] = []
            node = self._sink
            while node != atom:
                path.append(reached[node])
                node = self._to[reached[node] ^ 1]
            amount = min(room[edge] for edge in path)
            total += amount
            if math.isinf(amount):
                return total, set()
            for edge in path:
                room[edge] -= amount
                room[edge ^ 1] += amount
        return total, set()

    def _paths(self, atom: int, room: list[float]) -> dict[int, int]:
        """Nodes to which more can flow, each with the last edge of a shortest path; stops at the sink."""
        reached = {atom: -1}
        queue = [atom]
        for node in queue:
            self.visits += 1
            for edge in self._edges[node]:
                target = self._to[edge]
                if room[edge] > self._least and target not in reached:
                    reached[target] = edge
                    if target == self._sink:
                        return reached
                    queue.append(target)
        return reached
