r"""Reads the ``graph.txt`` of PipeDream's profiler (Narayanan et al., SOSP 2019; msr-fiddle/pipedream).

A line per node, and a line with a tab before it per edge::

    node1 -- Input -- forward_compute_time=9.085, …, parameter_size=0.000
    node2 -- LSTM(8, 8) -- forward_compute_time=1.5, …, activation_size=[8.0; 4.0], parameter_size=64.0
    \tnode1 -- node2

Times are milliseconds of one minibatch, sizes are bytes; ``activation_size`` may be a list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from forescale.core.cluster import Link
from forescale.core.errors import InvalidInput
from forescale.plan.cluster_file import ClusterFile, DeviceGroup, Level
from forescale.plan.placement.devices import TRAINING_STATE, device_kinds, speed_of, tensor_of, unit_devices
from forescale.plan.placement.problem import PlacementProblem

# From the right: a description may have commas, and " -- " too.
_NODE = re.compile(
    r"(?P<name>\S+) -- (?P<description>.*) -- forward_compute_time=(?P<forward>[^,]+), "
    r"backward_compute_time=(?P<backward>[^,]+), activation_size=(?P<activation>\[[^\]]*\]|[^,]+), "
    r"parameter_size=(?P<parameter>\S+)(?: -- stage_id=\d+)?"
)
_EDGE = re.compile(r"(\S+) -- (\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    forward_ms: float
    backward_ms: float
    activation_bytes: float
    parameter_bytes: float


def read_pipedream(text: str, cluster: ClusterFile) -> PlacementProblem:
    """One training step of one minibatch; the unit of time is the millisecond.

    Work is forward and backward, divided by the group's ``speed``. An activation travels to its readers and
    its gradient back, so a tensor costs twice its bytes over the slowest link on the way. A node takes
    ``TRAINING_STATE`` (4: gradients, AdamW) times its parameters, and its activation of one minibatch. As in
    PipeDream's own optimizer, a source described as ``Input…`` costs nothing: its time is the data loader's,
    and every device can load.

    Raises:
        InvalidInput: not that format, or not a graph that can be placed; it names the line or the node.
    """
    nodes, edges = _parse(text)
    position = {name: number for number, name in enumerate(nodes)}
    readers: dict[int, list[int]] = {}
    for source, target in edges:
        readers.setdefault(position[source], []).append(position[target])
    costs = list(nodes.values())
    work_N = np.array([node.forward_ms + node.backward_ms for node in costs])
    return PlacementProblem(
        nodes=tuple(nodes),
        work_KN=np.stack([work_N / speed_of(group) for group in cluster.groups]),
        memory_bytes_N=np.array(
            [TRAINING_STATE * node.parameter_bytes + node.activation_bytes for node in costs]
        ),
        nets=tuple(
            tensor_of(cluster, costs[source].activation_bytes, (source, *dict.fromkeys(read)), gradient=True)
            for source, read in readers.items()
        ),
        together=(),
        backward_N=np.zeros(len(costs), dtype=np.bool_),
        kinds=device_kinds(cluster),
        unit_devices=unit_devices(cluster),
    )


def published_cluster(count: int) -> ClusterFile:
    """What PipeDream's optimizer assumes unless told otherwise: 16 GB a device, 1 GB/s between them."""
    group = DeviceGroup(
        name="acc",
        kind="gpu",
        count=count,
        flops_per_s=None,
        half_flops_per_s=None,
        memory_bytes=16e9,
        memory_bandwidth_bytes_per_s=None,
        speed_ratio=None,
        pays_transfers=True,
    )
    link = Link(bandwidth_bytes_per_s=1e9, latency_s=0.0)
    return ClusterFile(groups=(group,), levels=(Level(name="cluster", members=count, link=link),))


def _parse(text: str) -> tuple[Mapping[str, _Node], Sequence[tuple[str, str]]]:
    nodes: dict[str, _Node] = {}
    inputs: set[str] = set()
    edges: list[tuple[str, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if line.startswith("\t"):
            edges.append(_edge(line.strip(), number))
            continue
        match = _NODE.fullmatch(line.strip())
        if match is None:
            raise InvalidInput(
                f"line {number} of the PipeDream graph is no node; it should read ID -- DESCRIPTION -- "
                "forward_compute_time=MS, backward_compute_time=MS, activation_size=BYTES, "
                "parameter_size=BYTES"
            )
        if match["name"] in nodes:
            raise InvalidInput(f"line {number} of the PipeDream graph: node {match['name']} is there twice")
        nodes[match["name"]] = _node(match)
        if match["description"].startswith("Input"):
            inputs.add(match["name"])
    for source, target in edges:
        for name in (source, target):
            if name not in nodes:
                raise InvalidInput(
                    f"the edge {source} -- {target} names {name}, which is no node of the graph"
                )
    free = _Node(forward_ms=0.0, backward_ms=0.0, activation_bytes=0.0, parameter_bytes=0.0)
    sources = inputs - {target for _, target in edges}
    return {name: free if name in sources else node for name, node in nodes.items()}, edges


def _edge(line: str, number: int) -> tuple[str, str]:
    match = _EDGE.fullmatch(line)
    if match is None:
        raise InvalidInput(f"line {number} of the PipeDream graph is no edge; it should read TAB ID -- ID")
    return match[1], match[2]


def _node(match: re.Match[str]) -> _Node:
    name = match["name"]
    activations = match["activation"].strip("[]")
    return _Node(
        forward_ms=_figure(match["forward"], "forward_compute_time", name),
        backward_ms=_figure(match["backward"], "backward_compute_time", name),
        activation_bytes=sum(
            _figure(part, "activation_size", name) for part in activations.split(";") if part.strip()
        ),
        parameter_bytes=_figure(match["parameter"], "parameter_size", name),
    )


def _figure(text: str, key: str, node: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise InvalidInput(f"{key} of node {node} is {text[:40]!r}, no number") from error
    if not (math.isfinite(value) and value >= 0):
        raise InvalidInput(f"{key} of node {node} is {text}; it must be finite and not negative")
    return value
