"""What moves as one: groups that must stay together, and what a contiguous placement cannot part either.

Axes: N = node, A = atom, K = device kind, B = block of atoms, E = edge, X = its producer, its reader.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forescale.plan.placement.problem import (
    Array,
    IntArray,
    Nets,
    PlacementProblem,
    distinct,
    readers_of,
    sums,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A graph whose nodes were put together. ``part_N``: number of each node's part; nets join parts."""

    part_N: IntArray
    work_KA: Array
    memory_bytes_A: Array
    nets: Nets

    @property
    def count(self) -> int:
        return len(self.memory_bytes_A)


def merge(problem: PlacementProblem, part_N: IntArray) -> Parts:
    """The problem with every part as one node."""
    count = int(part_N.max()) + 1
    return Parts(
        part_N=part_N,
        work_KA=np.stack([sums(part_N, work_N, count) for work_N in problem.work_KN]),
        memory_bytes_A=sums(part_N, problem.memory_bytes_N, count),
        nets=problem.pins.labelled(part_N, count),
    )


def atoms(problem: PlacementProblem) -> IntArray:
    """Atom of each node: nodes that must share a device have the same."""
    leader = list(range(len(problem.nodes)))
    if not problem.together:
        return np.array(leader)

    def find(node: int) -> int:
        while leader[node] != node:
            leader[node] = node = leader[leader[node]]
        return node

    for group in problem.together:
        for node in group[1:]:
            leader[find(node)] = find(group[0])
    return _numbered(np.array([find(node) for node in range(len(leader))]))


def blocks(problem: PlacementProblem, atom_N: IntArray) -> tuple[IntArray, IntArray]:
    """What intervals of a line are made of, and which block must come before which.

    Atoms on a cycle of the forward pass cannot be apart in intervals. Atoms of the backward pass alone are
    free of any order; each follows the neighbour it exchanges most with.

    Returns:
        The block of each node, and the edges between blocks, an array of two rows.
    """
    count = int(atom_N.max()) + 1
    forward_E = ~problem.backward_N[problem.edge_XE].any(axis=0)
    edge_XE = _distinct(atom_N[problem.edge_XE[:, forward_E]], count)
    component_A = _components(count, edge_XE)
    placed_A = np.zeros(count, dtype=bool)
    placed_A[atom_N[~problem.backward_N]] = True
    for atom, neighbour in _followers(problem, atom_N, placed_A):
        component_A[atom] = component_A[neighbour]
    block_A = _numbered(component_A)
    return block_A[atom_N], _distinct(block_A[edge_XE], count)


def _numbered(label_X: IntArray) -> IntArray:
    """Labels replaced by 0, 1, … in the order they first appear."""
    _, first, label_X = np.unique(label_X, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[label_X]


def _distinct(edge_XE: IntArray, count: int) -> IntArray:
    """Each edge once, in ascending order; none from a node to itself."""
    source_E, target_E = edge_XE[:, edge_XE[0] != edge_XE[1]]
    return np.stack(np.divmod(distinct(source_E * count + target_E), count))


def _followers(
    problem: PlacementProblem, atom_N: IntArray, placed_A: npt.NDArray[np.bool_]
) -> Iterable[tuple[int, int]]:
    """Atoms without a place with the neighbour each follows, in an order in which that has one.

    What is exchanged most comes first (as the trees of Prim, 1957).
    """
    exchanged = _exchanged(problem, atom_N, placed_A)
    known = set(np.flatnonzero(placed_A).tolist())
    waiting = [
        (-cost, -atom, -other)
        for atom, others in exchanged.items()
        for other, cost in others.items()
        if other in known
    ]
    heapq.heapify(waiting)
    while waiting:
        atom, other = (-number for number in heapq.heappop(waiting)[1:])
        if atom in known:
            continue
        yield atom, other
        known.add(atom)
        for neighbour in exchanged[atom]:
            if neighbour not in known:
                heapq.heappush(waiting, (-exchanged[neighbour][atom], -neighbour, -atom))


def _exchanged(
    problem: PlacementProblem, atom_N: IntArray, placed_A: npt.NDArray[np.bool_]
) -> dict[int, dict[int, float]]:
    """For every atom without a place, what it exchanges with its neighbours."""
    pins = problem.pins
    edge_XE = atom_N[problem.edge_XE]
    cost_E = np.repeat(pins.cost_H, pins.size_H - 1)
    exchanged: dict[int, dict[int, float]] = {}
    for a_E, b_E in (edge_XE, edge_XE[::-1]):
        wanted_E = ~placed_A[a_E] & (a_E != b_E)
        for a, b, cost in zip(*(x_E[wanted_E].tolist() for x_E in (a_E, b_E, cost_E)), strict=True):
            of_a = exchanged.setdefault(a, {})
            of_a[b] = of_a.get(b, 0.0) + cost
    return exchanged


def _components(count: int, edge_XE: IntArray) -> IntArray:
    """Strongly connected component of each node (Tarjan, 1972, without recursion)."""
    if (edge_XE[0] < edge_XE[1]).all():
        return np.arange(count)
    readers = readers_of(count, edge_XE)
    index, low = [-1] * count, [0] * count
    component = [-1] * count
    open_nodes: list[int] = []
    visits = 0
    for root in range(count):
        if index[root] >= 0:
            continue
        work = [(root, iter(readers[root]))]
        index[root] = low[root] = visits
        visits += 1
        open_nodes.append(root)
        while work:
            node, rest = work[-1]
            if (following := next(rest, None)) is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    _close(open_nodes, node, component)
            elif index[following] < 0:
                index[following] = low[following] = visits
                visits += 1
                open_nodes.append(following)
                work.append((following, iter(readers[following])))
            elif component[following] < 0:
                low[node] = min(low[node], index[following])
    return np.array(component)


def _close(open_nodes: list[int], root: int, component: list[int]) -> None:
    while component[root] < 0:
        component[open_nodes.pop()] = root
