"""The joint problem: a graph becomes a pipeline whose stages are replicated, split and recomputed.

Tarnawski, Narayanan, Phanishayee, *Piper: Multidimensional Planner for DNN Parallelization*, NeurIPS 2021,
§3, as in the code published with it. The samples of a batch pass through the stages one after the other; the
load of the slowest stage is the time per sample. A stage on d replicas of t devices each:

    load   = Σ work / d + (2 · transfers / d + 4 · (d-1)/d · Σ parameters / samples) / bandwidth
    memory = Σ (stored · y + fixed),  y = ⌈replicas of this and of all later stages / d⌉

Sums are over the nodes of the stage. Transfers are the bytes of every edge that enters or leaves it, plus
what the option chosen for the node at its end adds. Times are in the unit of the source, as is the
bandwidth's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from forescale.core.errors import InvalidInput
from forescale.plan.placement.problem import order_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A way to run a node on a number of devices: recomputing its activations, for example.

    Attributes:
        work: time forward and backward, per sample.
        parameter_bytes: what replicas exchange once per batch.
        stored_bytes: memory per sample in flight.
        fixed_bytes: memory whatever is in flight.
        received_bytes: added to the transfer from each predecessor (by number) in another stage.
        sent_bytes: added to the transfer to each successor in another stage.
    """

    name: str
    work: float
    parameter_bytes: float
    stored_bytes: float
    fixed_bytes: float
    received_bytes: Mapping[int, float]
    sent_bytes: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A transfer between nodes, by their numbers."""

    source: int
    target: int
    transfer_bytes: float


@dataclass(frozen=True, kw_only=True)
class JointProblem:
    """A graph, and the devices it shall run on.

    Attributes:
        nodes: their names.
        options: for each node its options by tensor-parallel degree.
        memory_bytes: of each device.
        bandwidth_bytes_per_time: of each device to all others.
        samples: microbatches in a batch; the replicas of a stage share them equally.

    Raises:
        InvalidInput: costs that are negative or missing, limits that are not positive, or a cycle.
    """

    nodes: tuple[str, ...]
    options: tuple[Mapping[int, tuple[Option, ...]], ...]
    edges: tuple[Edge, ...]
    devices: int
    memory_bytes: float
    bandwidth_bytes_per_time: float
    samples: int

    def __post_init__(self) -> None:
        if not self.nodes:
            raise InvalidInput("the graph has no nodes")
        for name, value in (
            ("number of devices", self.devices),
            ("memory of a device", self.memory_bytes),
            ("bandwidth", self.bandwidth_bytes_per_time),
            ("number of microbatches in a batch", self.samples),
        ):
            if not value > 0:
                raise InvalidInput(f"the {name} must be above zero, not {value}")
        ends = [(edge.source, edge.target) for edge in self.edges]
        order_of(len(self.nodes), ends, self.nodes)
        if len(set(ends)) < len(ends):
            raise InvalidInput("two edges join the same nodes; give one with the bytes of both")
        for edge in self.edges:
            if not 0 <= edge.transfer_bytes < math.inf:
                names = f"{self.nodes[edge.source]} → {self.nodes[edge.target]}"
                raise InvalidInput(f"the transfer {names} has a negative or infinite size")
        for node in range(len(self.nodes)):
            self._check_node(node)

    @cached_property
    def edges_into(self) -> tuple[tuple[Edge, ...], ...]:
        """Edges that end at each node."""
        found: list[list[Edge]] = [[] for _ in self.nodes]
        for edge in self.edges:
            found[edge.target].append(edge)
        return tuple(tuple(edges) for edges in found)

    @cached_property
    def edges_from(self) -> tuple[tuple[Edge, ...], ...]:
        """Edges that begin at each node."""
        found: list[list[Edge]] = [[] for _ in self.nodes]
        for edge in self.edges:
            found[edge.source].append(edge)
        return tuple(tuple(edges) for edges in found)

    @cached_property
    def most_replicas(self) -> int:
        """Bound on the sum of the data-parallel degrees."""
        return min(self.devices, self.samples)

    @cached_property
    def replicas(self) -> tuple[int, ...]:
        """Data-parallel degrees a stage may have: the samples must divide."""
        return tuple(d for d in range(1, self.most_replicas + 1) if self.samples % d == 0)

    @cached_property
    def tensor_degrees(self) -> tuple[int, ...]:
        """Tensor-parallel degrees that some node has an option for."""
        return tuple(sorted({t for by_degree in self.options for t in by_degree if t <= self.devices}))

    def _check_node(self, node: int) -> None:
        name = self.nodes[node]
        options = [option for by_degree in self.options[node].values() for option in by_degree]
        if not options:
            raise InvalidInput(f"node {name} has no option to run it")
        if any(degree < 1 for degree in self.options[node]):
            raise InvalidInput(f"node {name} has options for fewer than one device")
        for option in options:
            costs = {
                "time": (option.work,),
                "parameter size": (option.parameter_bytes,),
                "memory": (option.stored_bytes, option.fixed_bytes),
                "transfer": (*option.received_bytes.values(), *option.sent_bytes.values()),
            }
            for what, values in costs.items():
                if not all(0 <= value < math.inf for value in values):
                    raise InvalidInput(
                        f"option {option.name!r} of node {name} has a negative or infinite {what}"
                    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JointStage:
    """Nodes that run together, on ``replicas`` times ``tensor_degree`` devices.

    Attributes:
        nodes: their numbers.
        options: for each of ``nodes``, which of its options for ``tensor_degree`` devices.
    """

    nodes: tuple[int, ...]
    replicas: int
    tensor_degree: int
    options: tuple[int, ...]

    @property
    def devices(self) -> int:
        return self.replicas * self.tensor_degree


@dataclass(frozen=True, slots=True, kw_only=True)
class JointPlan:
    """Stages in the order in which samples pass them."""

    stages: tuple[JointStage, ...]
