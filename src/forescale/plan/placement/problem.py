"""The placement problem: nodes with costs go to devices of several kinds; the longest load shall be short.

Tarnawski et al., *Efficient Algorithms for Device Placement of DNN Graph Operators*, NeurIPS 2020: a device's
load is the work of its nodes, and, on a device that pays for transfers, the cost of every tensor that it
sends to or receives from other devices, once per tensor. Where links differ, that cost is the one of the
farthest device that it exchanges the tensor with.

Costs are in the unit of time of the graph, whichever that is.

Axes: K = device kind, N = node, D = device (kind after kind), H = net, P = pin (a node of a net), E = edge,
X = its producer, its reader; L = level of the devices' hierarchy, 0 the innermost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise, repeat
from typing import overload

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
    """A tensor: what it costs a device to send or to receive it, its producer, then its readers.

    Attributes:
        cost: between devices as near as can be.
        far_costs: between devices of each further level, outwards, none less than the one before.
    """

    cost: float
    nodes: tuple[int, ...]
    far_costs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What nets cost between devices of each level, and who produces them: readers have them from there."""

    cost_LH: Array
    source_H: IntArray

    def only(self, keep_H: npt.NDArray[np.bool_]) -> Levels:
        return Levels(cost_LH=self.cost_LH[:, keep_H], source_H=self.source_H[keep_H])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Nets(Sequence[Net]):
    """Nets in arrays: those of a million nodes would be slow as objects.

    Attributes:
        size_H: how many nodes each net has.
        node_P: the nodes of the first net, then those of the second, …
        levels: None if all devices are as far from each other.
    """

    cost_H: Array
    size_H: IntArray
    node_P: IntArray
    levels: Levels | None = None

    @classmethod
    def of(cls, nets: Sequence[Net]) -> Nets:
        if isinstance(nets, Nets):
            return nets
        levels = None
        if any(net.far_costs for net in nets):
            levels = Levels(
                cost_LH=np.array([(net.cost, *net.far_costs) for net in nets]).T,
                source_H=np.array([net.nodes[0] for net in nets]),
            )
        return cls(
            cost_H=np.array([net.cost for net in nets], dtype=np.float64),
            size_H=np.array([len(net.nodes) for net in nets], dtype=np.int64),
            node_P=np.fromiter(chain.from_iterable(net.nodes for net in nets), dtype=np.int64),
            levels=levels,
        )

    @property
    def start_H(self) -> IntArray:
        """Position of each net's first pin."""
        return np.cumsum(self.size_H) - self.size_H

    @property
    def net_P(self) -> IntArray:
        """Net of each pin."""
        return np.repeat(np.arange(len(self.size_H)), self.size_H)

    def spread_H(self, label_N: IntArray) -> npt.NDArray[np.bool_]:
        """Whether the nodes of each net have more than one label."""
        label_P = label_N[self.node_P]
        other = label_P != np.repeat(label_P[self.start_H], self.size_H)
        return np.bincount(self.net_P[other], minlength=len(self)) > 0

    def only(self, keep_H: npt.NDArray[np.bool_]) -> Nets:
        """Some of the nets."""
        return Nets(
            cost_H=self.cost_H[keep_H],
            size_H=self.size_H[keep_H],
            node_P=self.node_P[np.repeat(keep_H, self.size_H)],
            levels=self.levels and self.levels.only(keep_H),
        )

    def at(self, level: int) -> Nets:
        """As if all devices were that far from each other."""
        return self if self.levels is None else replace(self, cost_H=self.levels.cost_LH[level], levels=None)

    def labelled(self, label_N: IntArray, count: int) -> Nets:
        """Nets between labels 0 … count - 1 in place of nodes, in ascending order; only those of several."""
        nets = self.only(self.spread_H(label_N))
        net_P, label_P = np.divmod(distinct(nets.net_P * count + label_N[nets.node_P]), count)
        levels = nets.levels and replace(nets.levels, source_H=label_N[nets.levels.source_H])
        size_H = np.bincount(net_P, minlength=len(nets))
        return Nets(cost_H=nets.cost_H, size_H=size_H, node_P=label_P, levels=levels)

    def bundled(self) -> Nets:
        """Nets of the same nodes, and where it matters of the same producer, as one net."""
        bundles = [self.only(self.size_H == size)._of_one_size(int(size)) for size in np.unique(self.size_H)]
        levels = [nets.levels for nets in bundles if nets.levels is not None]
        return Nets(
            cost_H=np.concatenate([nets.cost_H for nets in bundles] or [self.cost_H]),
            size_H=np.concatenate([nets.size_H for nets in bundles] or [self.size_H]),
            node_P=np.concatenate([nets.node_P for nets in bundles] or [self.node_P]),
            levels=Levels(
                cost_LH=np.concatenate([known.cost_LH for known in levels], axis=1),
                source_H=np.concatenate([known.source_H for known in levels]),
            )
            if levels
            else self.levels,
        )

    def _of_one_size(self, size: int) -> Nets:
        key_HX = self.node_P.reshape(-1, size)
        if self.levels is not None:
            key_HX = np.column_stack([key_HX, self.levels.source_H])
        key_HX, bundle_H = np.unique(key_HX, axis=0, return_inverse=True)
        bundle_H, count = bundle_H.ravel(), len(key_HX)
        levels = self.levels and Levels(
            cost_LH=np.stack([sums(bundle_H, cost_H, count) for cost_H in self.levels.cost_LH]),
            source_H=key_HX[:, size],
        )
        return Nets(
            cost_H=sums(bundle_H, self.cost_H, count),
            size_H=np.full(count, size),
            node_P=key_HX[:, :size].ravel(),
            levels=levels,
        )

    def __len__(self) -> int:
        return len(self.cost_H)

    @overload
    def __getitem__(self, index: int) -> Net: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Net]: ...
    def __getitem__(self, index: int | slice) -> Net | Sequence[Net]:
        return tuple(self)[index]

    def __iter__(self) -> Iterator[Net]:
        nodes, start = self.node_P.tolist(), 0
        far = repeat(()) if self.levels is None else map(tuple, self.levels.cost_LH[1:].T.tolist())
        for cost, size, far_costs in zip(self.cost_H.tolist(), self.size_H.tolist(), far, strict=False):
            yield Net(cost=cost, nodes=tuple(nodes[start : start + size]), far_costs=far_costs)
            start += size


@dataclass(frozen=True, kw_only=True)
class PlacementProblem:
    """A graph to be placed.

    Attributes:
        nodes: their names.
        work_KN: time on a device of each kind; infinite where it cannot run.
        nets: tensors; of very many, best given as :class:`Nets`.
        together: groups of nodes that must share a device.
        backward_N: nodes of the backward pass; contiguity is asked of all others.
        unit_devices: how many devices that pay for transfers are in a unit (a node, a rack, …) of every level
            but the outermost, which holds all: they fill the units in their order. The others are as far from
            each device as the outermost level. None if all are as far from each other.

    Raises:
        InvalidInput: costs that are negative or missing, a node that no device can run, or a cycle.
    """

    nodes: tuple[str, ...]
    work_KN: Array
    memory_bytes_N: Array
    nets: Sequence[Net]
    together: tuple[tuple[int, ...], ...]
    backward_N: npt.NDArray[np.bool_]
    kinds: tuple[DeviceKind, ...]
    unit_devices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.nodes:
            raise InvalidInput("the graph has no nodes")
        if not any(kind.count for kind in self.kinds):
            raise InvalidInput("there is no device to place nodes on; give at least one")
        for kind in self.kinds:
            if kind.count < 0 or not kind.memory_bytes >= 0:
                raise InvalidInput(
                    f"the number or the memory of the devices {kind.name} is negative or missing"
                )
        # A time is infinite where a device cannot run the node; memory never is.
        memory_XN = np.where(np.isinf(self.memory_bytes_N), np.nan, self.memory_bytes_N)[None]
        for name, value_XN in (("time", self.work_KN), ("memory", memory_XN)):
            wrong = np.isnan(value_XN) | (value_XN < 0)
            if wrong.any():
                node = self.nodes[int(np.argwhere(wrong)[0][1])]
                raise InvalidInput(f"node {node} has a negative {name}, or none")
        usable_K = np.array([kind.count > 0 for kind in self.kinds])
        stuck_N = np.isinf(self.work_KN[usable_K]).all(axis=0)
        if stuck_N.any():
            raise InvalidInput(f"no device can run node {self.nodes[int(stuck_N.argmax())]}")
        self._check_transfers()
        if (self.edge_XE[0] >= self.edge_XE[1]).any():  # else the nodes stand in a topological order
            order_of(len(self.nodes), self.edge_XE.T, self.nodes)

    def _check_transfers(self) -> None:
        levels = self.pins.levels
        cost_LH = self.pins.cost_H[None] if levels is None else levels.cost_LH
        if len(self.pins) and len(cost_LH) != 1 + len(self.unit_devices):
            raise InvalidInput(
                f"a tensor needs {1 + len(self.unit_devices)} costs: one of each level of links"
            )
        # Also what falls from one level to the next is no cost of a level.
        wrong_H = ~((np.diff(cost_LH, axis=0, prepend=0.0) >= 0) & (cost_LH < np.inf)).all(axis=0)
        if wrong_H.any():
            node = self.pins.node_P[self.pins.start_H[wrong_H.argmax()]]
            raise InvalidInput(f"the output of node {self.nodes[node]} has a negative cost, or none")

    @cached_property
    def pins(self) -> Nets:
        """The nets in arrays."""
        return Nets.of(self.nets)

    @cached_property
    def edge_XE(self) -> IntArray:
        """Producers and their readers."""
        pins = self.pins
        is_reader_P = np.ones(len(pins.node_P), dtype=bool)
        is_reader_P[pins.start_H] = False
        source_P = np.repeat(pins.node_P[pins.start_H], pins.size_H)
        return np.stack([source_P[is_reader_P], pins.node_P[is_reader_P]])

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Pairs of producer and reader."""
        return tuple(zip(*self.edge_XE.tolist(), strict=True))

    @cached_property
    def devices(self) -> tuple[str, ...]:
        return tuple(f"{kind.name}{number}" for kind in self.kinds for number in range(kind.count))

    @cached_property
    def kind_D(self) -> IntArray:
        """Position of each device's kind."""
        return np.repeat(np.arange(len(self.kinds)), [kind.count for kind in self.kinds])

    @cached_property
    def pays_D(self) -> npt.NDArray[np.bool_]:
        """Whether each device pays for transfers."""
        return np.array([kind.pays_transfers for kind in self.kinds])[self.kind_D]

    @cached_property
    def level_DD(self) -> IntArray:
        """The level of links between two devices; 0 of a device and itself."""
        slot_D = np.cumsum(self.pays_D) - 1
        level_DD = np.zeros((len(slot_D), len(slot_D)), dtype=np.int64)
        for size in self.unit_devices:
            level_DD += slot_D[:, None] // size != slot_D // size
        outside_DD = ~(self.pays_D[:, None] & self.pays_D) & ~np.eye(len(slot_D), dtype=bool)
        level_DD[outside_DD] = len(self.unit_devices)
        return level_DD


def sums(index_X: IntArray, value_X: Array, count: int) -> Array:
    """Sum of the values at each index 0 … count - 1."""
    return np.bincount(index_X, value_X, count).astype(np.float64)


def distinct(value_X: IntArray) -> IntArray:
    """The values, none below 0, in ascending order; quicker than ``np.unique`` if nearly in order."""
    sorted_X = np.sort(value_X, kind="stable")
    return sorted_X[np.diff(sorted_X, prepend=-1) != 0]


def readers_of(count: int, edge_XE: IntArray) -> list[list[int]]:
    """The readers of each node 0 … count - 1, in the order of the edges."""
    source_E, reader_E = edge_XE
    flat = reader_E[np.argsort(source_E, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(source_E, minlength=count)).tolist()
    return [flat[start:end] for start, end in pairwise([0, *ends])]


def order_of(count: int, edges: Sequence[tuple[int, int]] | IntArray, names: Sequence[str]) -> list[int]:
    """A topological order of nodes 0 … count - 1 (Kahn, 1962).

    Args:
        edges: pairs of producer and reader.

    Raises:
        InvalidInput: the edges form a cycle; it names a node on it.
    """
    edge_XE = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    readers = readers_of(count, edge_XE)
    missing = np.bincount(edge_XE[1], minlength=count).tolist()
    order = [node for node in range(count) if not missing[node]]
    for node in order:
        for reader in readers[node]:
            missing[reader] -= 1
            if not missing[reader]:
                order.append(reader)
    if len(order) < count:
        raise InvalidInput(f"the graph has a cycle through or before node {_on_cycle(edge_XE, order, names)}")
    return order


def _on_cycle(edge_XE: IntArray, order: Sequence[int], names: Sequence[str]) -> str:
    """Walks back along edges that no order satisfies until a node comes twice."""
    done = set(order)
    edges = zip(*edge_XE.tolist(), strict=True)
    source_of: dict[int, int] = {
        target: source for source, target in edges if source not in done and target not in done
    }
    node, seen = next(iter(source_of)), set[int]()
    while node not in seen:
        seen.add(node)
        node = source_of[node]
    return names[node]
