"""The placement problem: nodes with costs go to devices of several kinds; the longest load shall be short.

Tarnawski et al., *Efficient Algorithms for Device Placement of DNN Graph Operators*, NeurIPS 2020: a device's
load is the work of its nodes, and, on a device that pays for transfers, the cost of every tensor that it
sends to or receives from other devices, once per tensor.

Costs are in the unit of time of the graph, whichever that is.

Axes: K = device kind, N = node, D = device (kind after kind).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from forescale.core.errors import InvalidInput

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """Devices that are alike, named ``acc0``, ``acc1``, … for the name ``acc``."""

    name: str
    count: int
    memory_bytes: float
    pays_transfers: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """A tensor: what it costs a device to send or to receive it, its producer, then its readers."""

    cost: float
    nodes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PlacementProblem:
    """A graph to be placed.

    Attributes:
        nodes: their names.
        work_KN: time on a device of each kind; infinite where it cannot run.
        together: groups of nodes that must share a device.
        backward_N: nodes of the backward pass; contiguity is asked of all others.

    Raises:
        InvalidInput: costs that are negative or missing, a node that no device can run, or a cycle.
    """

    nodes: tuple[str, ...]
    work_KN: Array
    memory_bytes_N: Array
    nets: tuple[Net, ...]
    together: tuple[tuple[int, ...], ...]
    backward_N: npt.NDArray[np.bool_]
    kinds: tuple[DeviceKind, ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise InvalidInput("the graph has no nodes")
        if not any(kind.count for kind in self.kinds):
            raise InvalidInput("there is no device to place nodes on; give at least one")
        for name, value_XN in (("time", self.work_KN), ("memory", self.memory_bytes_N[None])):
            wrong = np.isnan(value_XN) | (value_XN < 0)
            if wrong.any():
                raise InvalidInput(f"node {self.nodes[int(np.argwhere(wrong)[0][1])]} has a negative {name}")
        usable_K = np.array([kind.count > 0 for kind in self.kinds])
        stuck_N = np.isinf(self.work_KN[usable_K]).all(axis=0)
        if stuck_N.any():
            raise InvalidInput(f"no device can run node {self.nodes[int(stuck_N.argmax())]}")
        for net in self.nets:
            if not net.cost >= 0:
                raise InvalidInput(f"the output of node {self.nodes[net.nodes[0]]} has a negative cost")
        order_of(len(self.nodes), self.edges, self.nodes)

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Pairs of producer and reader."""
        return tuple((net.nodes[0], reader) for net in self.nets for reader in net.nodes[1:])

    @cached_property
    def devices(self) -> tuple[str, ...]:
        return tuple(f"{kind.name}{number}" for kind in self.kinds for number in range(kind.count))

    @cached_property
    def kind_D(self) -> IntArray:
        """Position of each device's kind."""
        return np.repeat(np.arange(len(self.kinds)), [kind.count for kind in self.kinds])


def sums(index_X: IntArray, value_X: Array, count: int) -> Array:
    """Sum of the values at each index 0 … count - 1."""
    return np.bincount(index_X, value_X, count).astype(np.float64)


def order_of(count: int, edges: Sequence[tuple[int, int]], names: Sequence[str]) -> list[int]:
    """A topological order of nodes 0 … count - 1 (Kahn, 1962).

    Raises:
        InvalidInput: the edges form a cycle; it names a node on it.
    """
    readers: list[list[int]] = [[] for _ in range(count)]
    missing = [0] * count
    for source, target in edges:
        readers[source].append(target)
        missing[target] += 1
    order = [node for node in range(count) if not missing[node]]
    for node in order:
        for reader in readers[node]:
            missing[reader] -= 1
            if not missing[reader]:
                order.append(reader)
    if len(order) < count:
        raise InvalidInput(f"the graph has a cycle through or before node {_on_cycle(edges, order, names)}")
    return order


def _on_cycle(edges: Sequence[tuple[int, int]], order: Sequence[int], names: Sequence[str]) -> str:
    """Walks back along edges that no order satisfies until a node comes twice."""
    done = set(order)
    source_of = {target: source for source, target in edges if source not in done and target not in done}
    node, seen = next(iter(source_of)), set[int]()
    while node not in seen:
        seen.add(node)
        node = source_of[node]
    return names[node]
