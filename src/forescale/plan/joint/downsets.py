"""Where a graph may be cut: sets of nodes that hold every predecessor of their nodes.

A stage is the difference of two such sets, one within the other. All of them are taken where they are few (a
chain of residual blocks); of a wider graph, those that several topological orders pass through.

Axes: F = set, by size, from the empty set to all nodes; N = node; P = pair of sets, the first within the
second, sorted by the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from forescale.plan.joint.problem import JointPlan, JointProblem
from forescale.plan.placement.problem import Array, IntArray

_MOST_ORDERS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Downsets:
    """The sets, and the pairs that make a stage.

    Attributes:
        member_FN: 1 for the nodes of each set, else 0.
        complete: whether these are all there are.
        smaller_P, larger_P: the sets of each pair; what is in the second alone is the stage.
    """

    member_FN: Array
    complete: bool
    smaller_P: IntArray
    larger_P: IntArray


def all_downsets(problem: JointProblem, most: int) -> Downsets | None:
    """All sets; none if there are more than ``most``."""
    sets = _all_sets(problem, most)
    return None if sets is None else _downsets(problem, sets, complete=True)


def downsets_of_orders(
    problem: JointProblem, most: int, rng: np.random.Generator, *, near: JointPlan | None = None
) -> Downsets:
    """About ``most`` sets that topological orders pass through.

    Args:
        near: a plan whose cuts are among them; nodes then only move between neighbouring stages.
    """
    return _downsets(problem, _sets_of_orders(problem, most, rng, near), complete=False)


def _downsets(problem: JointProblem, sets: Sequence[int], *, complete: bool) -> Downsets:
    nodes = len(problem.nodes)
    width = (nodes + 7) // 8
    packed = np.frombuffer(b"".join(held.to_bytes(width, "little") for held in sets), dtype=np.uint8)
    bits_FN = np.unpackbits(packed.reshape(-1, width), axis=1, count=nodes, bitorder="little")
    member_FN = bits_FN[np.argsort(bits_FN.sum(axis=1), kind="stable")].astype(np.float64)
    size_F = member_FN.sum(axis=1)
    within_FF = (member_FN @ member_FN.T == size_F[:, None]) & (size_F[:, None] < size_F)
    smaller_P, larger_P = np.nonzero(within_FF)
    return Downsets(member_FN=member_FN, complete=complete, smaller_P=smaller_P, larger_P=larger_P)


def _all_sets(problem: JointProblem, most: int) -> list[int] | None:
    """Every set, as bits of an integer; none if there are more than ``most``."""
    count = len(problem.nodes)
    if count >= most:  # any order alone passes through more
        return None
    before = [sum(1 << edge.source for edge in edges) for edges in problem.edges_into]
    found, seen = [0], {0}
    for held in found:
        for node in range(count):
            larger = held | 1 << node
            if larger != held and not before[node] & ~held and larger not in seen:
                seen.add(larger)
                found.append(larger)
        if len(found) > most:
            return None
    return found


def _sets_of_orders(
    problem: JointProblem, most: int, rng: np.random.Generator, near: JointPlan | None
) -> list[int]:
    """Sets that topological orders pass through, thinned where one order alone has too many."""
    count = len(problem.nodes)
    found = dict.fromkeys((0, (1 << count) - 1))
    stage_N = np.zeros(count, dtype=np.int64)
    held = 0
    for number, stage in enumerate(near.stages if near else ()):
        stage_N[list(stage.nodes)] = number
        held |= sum(1 << node for node in stage.nodes)
        found[held] = None
    for order in _orders(problem, rng, stage_N):
        if near is None:
            kept_X = np.linspace(0, count, min(most, count + 1)).astype(int)
        else:
            kept_X = rng.choice(count + 1, min(most, count + 1), replace=False)
        kept = set(kept_X.tolist())
        held = 0
        for done, node in enumerate(order, start=1):
            held |= 1 << node
            if done in kept:
                found[held] = None
        if len(found) >= most:
            break
    return list(found)


def _orders(problem: JointProblem, rng: np.random.Generator, stage_N: IntArray) -> Iterator[list[int]]:
    """Topological orders, in turn depth first (few tensors cross a cut), breadth first and at random.

    Pairs of stages follow each other, in turn those that begin with an even and with an odd one.
    """
    count = len(problem.nodes)
    for number in range(_MOST_ORDERS):
        missing = [len(edges) for edges in problem.edges_into]
        pair = ((stage_N + number % 2) // 2).tolist()
        ready = [node for node in range(count) if not missing[node]]
        order: list[int] = []
        while ready:
            first = min(pair[node] for node in ready)
            open_now = [node for node in ready if pair[node] == first]
            node = open_now[(-1, 0, int(rng.integers(len(open_now))))[number % 3]]
            ready.remove(node)
            order.append(node)
            readers = [edge.target for edge in problem.edges_from[node]]
            for reader in rng.permutation(readers).tolist() if readers else ():
                missing[reader] -= 1
                if not missing[reader]:
                    ready.append(reader)
        yield order
