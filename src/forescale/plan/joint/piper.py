"""Reads the JSON of Tarnawski et al., *Piper*, NeurIPS 2021 (github.com/msr-fiddle/piper).

``syncTimeFw`` has predecessors as keys and ``syncTimeBw`` successors, as in the published files and code
(their description has it the other way round); both hold bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from forescale.core.errors import InvalidInput
from forescale.plan.joint.problem import Edge, JointProblem, Option


def read_piper(text: str) -> JointProblem:
    """Nodes with their options (``TMPCs``) by tensor-parallel degree, edges, and the devices' limits.

    Raises:
        InvalidInput: not that format, or not a graph that can be planned.
    """
    try:
        content: Mapping[str, Any] = json.loads(text)
        nodes: list[Mapping[str, Any]] = content["nodes"]
        number = {int(node["id"]): position for position, node in enumerate(nodes)}
        if len(number) < len(nodes):
            raise InvalidInput("two nodes of the graph have the same id")
        edges = tuple(_edge(edge, number) for edge in content["edges"])
        before: list[set[int]] = [set() for _ in nodes]
        after: list[set[int]] = [set() for _ in nodes]
        for edge in edges:
            before[edge.target].add(edge.source)
            after[edge.source].add(edge.target)
        return JointProblem(
            nodes=tuple(str(identifier) for identifier in number),
            options=tuple(map(partial(_options, number), nodes, before, after)),
            edges=edges,
            devices=int(content["maxDevices"]),
            memory_bytes=float(content["maxMemoryPerDevice"]),
            bandwidth_bytes_per_time=float(content["bandwidth"]),
            samples=int(content["mbsInBatch"]),
        )
    except KeyError as error:
        raise InvalidInput(f"the Piper graph lacks {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidInput(f"not a Piper graph: {error}") from error


def _edge(edge: Mapping[str, Any], number: Mapping[int, int]) -> Edge:
    source, target = int(edge["sourceId"]), int(edge["destId"])
    for end in (source, target):
        if end not in number:
            raise InvalidInput(f"the edge {source} → {target} names node {end}, which is not there")
    return Edge(source=number[source], target=number[target], transfer_bytes=float(edge["communicationCost"]))


def _options(
    number: Mapping[int, int], node: Mapping[str, Any], before: set[int], after: set[int]
) -> Mapping[int, tuple[Option, ...]]:
    options = {
        int(degree): tuple(_option(option, node, number) for option in options)
        for degree, options in node["TMPCs"].items()
    }
    for option in (option for by_degree in options.values() for option in by_degree):
        for key, ends, given, wanted in (
            ("syncTimeFw", "predecessors", option.received_bytes, before),
            ("syncTimeBw", "successors", option.sent_bytes, after),
        ):
            if set(given) != wanted:
                raise InvalidInput(
                    f"{key} of option {option.name!r} of node {node['id']} does not have the node's {ends}"
                )
    return {degree: by_degree for degree, by_degree in options.items() if by_degree}


def _option(option: Mapping[str, Any], node: Mapping[str, Any], number: Mapping[int, int]) -> Option:
    try:
        return Option(
            name=str(option["id"]),
            work=float(option["timePerSample"]),
            parameter_bytes=float(option["parameterSize"]),
            stored_bytes=float(option["memoryUsageA"]),
            fixed_bytes=float(option["memoryUsageB"]),
            received_bytes=_by_node(option["syncTimeFw"], number),
            sent_bytes=_by_node(option["syncTimeBw"], number),
        )
    except KeyError as error:
        raise InvalidInput(f"an option of node {node['id']} lacks {error}") from error


def _by_node(given: Mapping[str, Any], number: Mapping[int, int]) -> Mapping[int, float]:
    """An unknown node gets a number that no neighbour has."""
    return {number.get(int(key), -1): float(value) for key, value in given.items()}
