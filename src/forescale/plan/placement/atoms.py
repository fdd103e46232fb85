"""What moves as one: groups that must stay together, and what a contiguous placement cannot part either.

Axes: N = node, A = atom, K = device kind, B = block of atoms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from forescale.plan.placement.problem import Array, IntArray, Net, PlacementProblem, sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A graph whose nodes were put together. ``part_N``: number of each node's part; nets join parts."""

    part_N: IntArray
    work_KA: Array
    memory_bytes_A: Array
    nets: tuple[Net, ...]

    @property
    def count(self) -> int:
        return len(self.memory_bytes_A)


def merge(problem: PlacementProblem, part_N: IntArray) -> Parts:
    """The problem with every part as one node."""
    count = int(part_N.max()) + 1
    nets: list[Net] = []
    for net in problem.nets:
        parts = tuple(dict.fromkeys(part_N[list(net.nodes)].tolist()))
        if len(parts) > 1:
            nets.append(Net(cost=net.cost, nodes=parts))
    return Parts(
        part_N=part_N,
        work_KA=np.stack([sums(part_N, work_N, count) for work_N in problem.work_KN]),
        memory_bytes_A=sums(part_N, problem.memory_bytes_N, count),
        nets=tuple(nets),
    )


def atoms(problem: PlacementProblem) -> IntArray:
    """Atom of each node: nodes that must share a device have the same."""
    leader = list(range(len(problem.nodes)))

    def find(node: int) -> int:
        while leader[node] != node:
            leader[node] = node = leader[leader[node]]
        return node

    for group in problem.together:
        for node in group[1:]:
            leader[find(node)] = find(group[0])
    return _numbered([find(node) for node in range(len(leader))])


def blocks(problem: PlacementProblem, atom_N: IntArray) -> tuple[IntArray, list[tuple[int, int]]]:
    """What intervals of a line are made of, and which block must come before which.

    Atoms on a cycle of the forward pass cannot be apart in intervals. Atoms of the backward pass alone are
    free of any order; each follows the neighbour it exchanges most with.

    Returns:
        The block of each node, and the edges between blocks.
    """
    forward_N = ~problem.backward_N
    edges = {
        (int(atom_N[source]), int(atom_N[target]))
        for source, target in problem.edges
        if forward_N[source] and forward_N[target] and atom_N[source] != atom_N[target]
    }
    component_A = _components(int(atom_N.max()) + 1, edges)
    placed = set(atom_N[forward_N].tolist())
    for atom, neighbour in _followers(problem, atom_N, placed):
        component_A[atom] = component_A[neighbour]
    block_A = _numbered(component_A)
    ordered = {(int(block_A[a]), int(block_A[b])) for a, b in edges if block_A[a] != block_A[b]}
    return block_A[atom_N], sorted(ordered)


def _numbered(labels: Sequence[int]) -> IntArray:
    """Labels replaced by 0, 1, … in the order they first appear."""
    number: dict[int, int] = {}
    return np.array([number.setdefault(label, len(number)) for label in labels], dtype=np.int64)


def _followers(problem: PlacementProblem, atom_N: IntArray, placed: set[int]) -> Iterable[tuple[int, int]]:
    """Atoms without a place with the neighbour each follows, in an order in which that has one."""
    exchanged: dict[int, dict[int, float]] = {}
    for net in problem.nets:
        source, *readers = (int(atom_N[node]) for node in net.nodes)
        for reader in readers:
            for a, b in ((source, reader), (reader, source)):
                if a != b and a not in placed:
                    exchanged.setdefault(a, {})[b] = exchanged.get(a, {}).get(b, 0.0) + net.cost
    known, missing = set(placed), set(exchanged)
    while missing:
        found = [
            (cost, atom, other)
            for atom in missing
            for other, cost in exchanged[atom].items()
            if other in known
        ]
        if not found:
            return
        _, atom, other = max(found)
        yield atom, other
        known.add(atom)
        missing.remove(atom)


def _components(count: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """Strongly connected component of each node (Tarjan, 1972, without recursion)."""
    readers: list[list[int]] = [[] for _ in range(count)]
    for source, target in edges:
        readers[source].append(target)
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
    return component


def _close(open_nodes: list[int], root: int, component: list[int]) -> None:
    while component[root] < 0:
        component[open_nodes.pop()] = root
