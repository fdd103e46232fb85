"""Topological orders of a graph's operators, in which stages are then intervals.

Operators that must share a stage, and whatever lies on a path between them, form one *atom*; orders
are orders of atoms. Each order offers other cuts: a depth-first one keeps branches whole, a
breadth-first one advances on all of them, a lean one keeps few bytes between left and right.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from forescale.graph.model import ModelGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class Atoms:
    """Groups of operators that stay together, by their first operator, and the acyclic graph they form."""

    members: tuple[tuple[int, ...], ...]
    atom_of: tuple[int, ...]
    predecessors: tuple[tuple[int, ...], ...]
    successors: tuple[tuple[int, ...], ...]


def gather_atoms(graph: ModelGraph) -> Atoms:
    count = len(graph.operators)
    before = [set(operators) for operators in graph.predecessors]
    after: list[set[int]] = [set() for _ in range(count)]
    for group in graph.colocated:
        # A cycle through the group makes it, with all that lies between, strongly connected.
        for operator, following in zip(group, (*group[1:], group[0]), strict=True):
            before[following].add(operator)
    for operator, earlier in enumerate(before):
        for predecessor in earlier:
            after[predecessor].add(operator)
    first_of = list(range(count))
    for group in graph.colocated:
        if first_of[group[0]] == group[0]:
            together = _reached(group[0], before) & _reached(group[0], after)
            for operator in together:
                first_of[operator] = min(together)
    firsts = sorted(set(first_of))
    number = {first: atom for atom, first in enumerate(firsts)}
    atom_of = tuple(number[first] for first in first_of)
    members: list[list[int]] = [[] for _ in firsts]
    for operator, atom in enumerate(atom_of):
        members[atom].append(operator)

    def between(neighbours: Sequence[set[int]], atom: int) -> tuple[int, ...]:
        return tuple(sorted({atom_of[o] for member in members[atom] for o in neighbours[member]} - {atom}))

    return Atoms(
        members=tuple(map(tuple, members)),
        atom_of=atom_of,
        predecessors=tuple(between(before, atom) for atom in range(len(members))),
        successors=tuple(between(after, atom) for atom in range(len(members))),
    )


def linear_orders(graph: ModelGraph, atoms: Atoms, tensor_bytes: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Distinct orders of the atoms, each as the atoms in order; the captured one first."""
    level = [0] * len(atoms.members)
    captured = _linearise(atoms.predecessors, atoms.successors, lambda atom, _: (atom, 0))
    for atom in captured:
        level[atom] = 1 + max((level[p] for p in atoms.predecessors[atom]), default=-1)
    orders = [
        captured,
        _linearise(atoms.predecessors, atoms.successors, lambda atom, ready: (-ready, atom)),
        _linearise(atoms.successors, atoms.predecessors, lambda atom, ready: (-ready, -atom))[::-1],
        _linearise(atoms.predecessors, atoms.successors, lambda atom, _: (level[atom], atom)),
        _lean(graph, atoms, tensor_bytes),
    ]
    return list(dict.fromkeys(orders))


def _reached(start: int, neighbours: Sequence[set[int]]) -> set[int]:
    reached, pending = {start}, [start]
    while pending:
        new = neighbours[pending.pop()] - reached
        reached |= new
        pending += new
    return reached


def _linearise(
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    priority: Callable[[int, int], tuple[int, int]],
) -> tuple[int, ...]:
    """Kahn's algorithm (1962); the least ``priority(atom, ready since)`` of those ready goes first."""
    missing = [len(atoms) for atoms in before]
    ready = [(priority(atom, 0), atom) for atom, count in enumerate(missing) if count == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        order.append(atom := heapq.heappop(ready)[1])
        for successor in after[atom]:
            missing[successor] -= 1
            if missing[successor] == 0:
                heapq.heappush(ready, (priority(successor, len(order)), successor))
    return tuple(order)


def _lean(graph: ModelGraph, atoms: Atoms, tensor_bytes: Mapping[str, int]) -> tuple[int, ...]:
    """Greedy: always the atom that adds the fewest bytes to those still needed further right."""
    waiting: dict[str, set[int]] = {}
    reads: list[set[str]] = [set() for _ in atoms.members]
    made_bytes = [0] * len(atoms.members)
    for name, tensor in graph.tensors.items():
        maker = None if tensor.producer is None else atoms.atom_of[tensor.producer]
        readers = {atoms.atom_of[consumer] for consumer in tensor.consumers} - {maker}
        if maker is None or not readers:
            continue
        waiting[name] = readers
        made_bytes[maker] += tensor_bytes[name]
        for reader in readers:
            reads[reader].add(name)

    def added_bytes(atom: int) -> tuple[int, int]:
        freed = sum(tensor_bytes[name] for name in reads[atom] if len(waiting[name]) == 1)
        return made_bytes[atom] - freed, atom

    missing = [len(predecessors) for predecessors in atoms.predecessors]
    ready = {atom for atom, count in enumerate(missing) if count == 0}
    order: list[int] = []
    while ready:
        atom = min(ready, key=added_bytes)
        ready.remove(atom)
        order.append(atom)
        for name in reads[atom]:
            waiting[name].remove(atom)
        for successor in atoms.successors[atom]:
            missing[successor] -= 1
            if missing[successor] == 0:
                ready.add(successor)
    return tuple(order)
