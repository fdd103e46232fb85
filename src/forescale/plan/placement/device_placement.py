"""Reads the JSON of Tarnawski et al., NeurIPS 2020 (github.com/msr-fiddle/dnn-partitioning)."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
        accelerator = [float(node["fpgaLatency"]) if node["supportedOnFpga"] else np.inf for node in nodes]
        cpu = [float(node["cpuLatency"]) for node in nodes]
        groups: dict[Any, list[int]] = {}
        for number, node in enumerate(nodes):
            if "colorClass" in node:
                groups.setdefault(node["colorClass"], []).append(number)
        return PlacementProblem(
            nodes=tuple(str(identifier) for identifier in position),
            work_KN=np.array([accelerator, cpu]).reshape(2, -1),
            memory_bytes_N=np.array([float(node.get("size", 0.0)) for node in nodes]),
            nets=_nets(content, position),
            together=tuple(tuple(group) for group in groups.values() if len(group) > 1),
            backward_N=np.array([bool(node["isBackwardNode"]) for node in nodes]),
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
        raise InvalidInput(f"the graph lacks {error}, or an edge names a node that is not there") from error
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"not a device-placement graph: {error}") from error


def _nets(content: Mapping[str, Any], position: Mapping[int, int]) -> tuple[Net, ...]:
    readers: dict[int, list[int]] = {}
    cost: dict[int, float] = {}
    for edge in content["edges"]:
        source = position[int(edge["sourceId"])]
        readers.setdefault(source, []).append(position[int(edge["destId"])])
        cost[source] = float(edge["cost"])
    return tuple(
        Net(cost=cost[source], nodes=(source, *dict.fromkeys(read))) for source, read in readers.items()
    )
