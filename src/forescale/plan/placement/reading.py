"""Reads a graph to be placed, in whichever of the formats it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.plan.cluster_file import ClusterFile
from forescale.plan.placement.device_placement import read_device_placement
from forescale.plan.placement.devices import device_kinds
from forescale.plan.placement.model_graph import read_model_graph
from forescale.plan.placement.pipedream import published_cluster, read_pipedream
from forescale.plan.placement.problem import PlacementProblem

Format = Literal["device-placement", "pipedream", "piper", "model"]
FORMATS: tuple[Format, ...] = get_args(Format)

TIME_UNIT: Mapping[Format, str] = {
    "device-placement": "the graph's unit of time",
    "pipedream": "ms",
    "piper": "the graph's unit of time",
    "model": "ms",
}

# Keys that only one format has; a file that was cut off still begins with one of them.
_KEYS: Mapping[Format, tuple[str, ...]] = {
    "device-placement": ('"maxFPGAs"', '"fpgaLatency"', '"maxSizePerFPGA"'),
    "piper": ('"mbsInBatch"', '"TMPCs"', '"maxDevices"'),
    "model": ('"operators"',),
}


def format_named(name: str) -> Format:
    """The format of that name.

    Raises:
        InvalidInput: there is none.
    """
    for known in FORMATS:
        if known == name:
            return known
    raise InvalidInput(f"{name} is no format of graphs; there are {', '.join(FORMATS)}")


def detect_format(text: str) -> Format:
    """The format of a graph by what it contains.

    Raises:
        InvalidInput: none of the four.
    """
    if not text.strip():
        raise InvalidInput("the graph's file is empty")
    if text.lstrip().startswith("{"):
        for name, keys in _KEYS.items():
            if any(key in text for key in keys):
                return name
    elif "forward_compute_time=" in text:
        return "pipedream"
    raise InvalidInput(
        "the file is no graph in a known format: device-placement (JSON with maxFPGAs, nodes and edges), "
        "pipedream (lines ID -- DESCRIPTION -- forward_compute_time=…), piper (JSON with maxDevices and "
        "TMPCs), model (JSON with format and operators)"
    )


def read_graph(
    text: str,
    *,
    graph_format: Format | None = None,
    cluster: ClusterFile | None = None,
    devices: int | None = None,
    batch: Mapping[str, int] | None = None,
) -> PlacementProblem:
    """A graph and the devices to place it on.

    Args:
        graph_format: if not to be detected.
        cluster: the devices; a device-placement graph may do without, and takes its own.
        devices: instead of a cluster, how many accelerators of the kind that the format's authors used.
        batch: of a model: values of its symbols.

    Raises:
        InvalidInput: an unknown format, or a graph that cannot be placed.
    """
    if cluster is not None and devices is not None:
        raise InvalidInput("give a cluster or a number of devices, not both")
    graph_format = graph_format or detect_format(text)
    if batch and graph_format != "model":
        raise InvalidInput("only a model has symbols whose values can be given")
    match graph_format:
        case "device-placement":
            return _device_placement(text, cluster, devices)
        case "pipedream":
            return read_pipedream(text, cluster or published_cluster(_required(devices)))
        case "model":
            if cluster is None:
                raise InvalidInput("a model says nothing of devices; give a cluster file")
            return read_model_graph(text, cluster, batch=batch or {})
        case "piper":
            raise InvalidInput("Piper's graphs have alternatives per node and are not placed node by node")


def _required(devices: int | None) -> int:
    if devices is None:
        raise InvalidInput("a PipeDream graph says nothing of devices; give a cluster file or their number")
    return devices


def _device_placement(text: str, cluster: ClusterFile | None, devices: int | None) -> PlacementProblem:
    """The graph with its own devices, or with those of the cluster.

    Groups of kind ``cpu`` take the graph's CPU times, all others its accelerator times, divided by their
    speed.
    Costs of transfers stay: the format gives neither bytes nor a bandwidth to scale them by.
    """
    problem = read_device_placement(text)
    accelerator, cpu = problem.kinds
    if devices is not None:
        return replace(problem, kinds=(replace(accelerator, count=devices), cpu))
    if cluster is None:
        return problem
    accelerator_N, cpu_N = problem.work_KN
    return replace(
        problem,
        work_KN=np.stack(
            [(cpu_N if g.kind == "cpu" else accelerator_N) / (g.speed_ratio or 1.0) for g in cluster.groups]
        ),
        kinds=device_kinds(cluster),
    )
