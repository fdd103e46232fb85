"""Reads the JSON of Tarnawski et al., NeurIPS 2020 (github.com/msr-fiddle/dnn-partitioning)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.plan.placement.problem import DeviceKind, Net, PlacementProblem


def read_device_placement(text: str) -> PlacementProblem:
    """Nodes with latencies on accelerators (``acc0`` …) and CPUs (``cpu0`` …), and what transfers cost.

    Raises:
        InvalidInput: not that format, or not a graph that can be placed.
    """
    try:
        content: Mapping[str, Any] = json.loads(text)
        nodes: list[Mapping[str, Any]] = content["nodes"]
        position = {int(node["id"]): number for number, node in enumerate(nodes)}
        if len(position) < len(nodes):
            raise InvalidInput("two nodes of the graph have the same id")
        groups: dict[Any, list[int]] = {}
        for number, node in enumerate(nodes):
            if "colorClass" in node:
                groups.setdefault(node["colorClass"], []).append(number)
        return PlacementProblem(
            nodes=tuple(str(identifier) for identifier in position),
            work_KN=np.array([_accelerator_times(nodes), [_number(node, "cpuLatency") for node in nodes]]),
            memory_bytes_N=np.array([_number(node, "size") if "size" in node else 0.0 for node in nodes]),
            nets=_nets(content["edges"], position),
            together=tuple(tuple(group) for group in groups.values() if len(group) > 1),
            backward_N=np.array([bool(node.get("isBackwardNode")) for node in nodes], dtype=bool),
            kinds=(
                DeviceKind(
                    name="acc",
                    count=int(content["maxFPGAs"]),
                    memory_bytes=float(content["maxSizePerFPGA"]),
                    pays_transfers=True,
                ),
                DeviceKind(
                    name="cpu", count=int(content["maxCPUs"]), memory_bytes=np.inf, pays_transfers=False
                ),
            ),
        )
    except KeyError as error:
        raise InvalidInput(f"the graph lacks {error}") from error
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidInput(f"not a device-placement graph: {error}") from error


def _accelerator_times(nodes: Sequence[Mapping[str, Any]]) -> list[float]:
    return [_number(node, "fpgaLatency") if node.get("supportedOnFpga", True) else np.inf for node in nodes]


def _number(node: Mapping[str, Any], key: str) -> float:
    if key not in node:
        raise InvalidInput(f"node {node['id']} has no {key}")
    return float(node[key])


def _nets(edges: Sequence[Mapping[str, Any]], position: Mapping[int, int]) -> tuple[Net, ...]:
    readers: dict[int, list[int]] = {}
    cost: dict[int, float] = {}
    for edge in edges:
        ends = [int(edge["sourceId"]), int(edge["destId"])]
        for end in ends:
            if end not in position:
                raise InvalidInput(f"the edge {ends[0]} -> {ends[1]} names node {end}, which is not there")
        source, reader = (position[end] for end in ends)
        readers.setdefault(source, []).append(reader)
        if "cost" not in edge:
            raise InvalidInput(f"the edge {ends[0]} -> {ends[1]} has no cost")
        cost[source] = float(edge["cost"])
    return tuple(
        Net(cost=cost[source], nodes=(source, *dict.fromkeys(read))) for source, read in readers.items()
    )
