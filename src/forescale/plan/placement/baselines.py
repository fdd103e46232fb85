"""What others would do on the same problem, to set a placement beside.

Axes: N = node, A = atom, B = block along a line, D = device, E = edge, j = boundary before the j-th block.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.plan.placement.atoms import Parts, atoms, blocks, merge
from forescale.plan.placement.forward import forward_edges
from forescale.plan.placement.latency import scheduled_as
from forescale.plan.placement.loads import loads, memory_bytes
from forescale.plan.placement.place import Placement
from forescale.plan.placement.problem import Array, IntArray, PlacementProblem, order_of

_METIS_WEIGHT = 1_000_000
"""METIS' weights are whole numbers: those of all atoms and of all edges sum up to about this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One way to place the graph.

    Attributes:
        objective: the longest load, or the latency if ours is for that; None if a node is on a device that
            cannot run it.
        ratio: objective over that of our placement.
        fault: why the placement cannot be used, if it cannot.
    """

    name: str
    objective: float | None
    ratio: float | None
    fault: str | None = None

    @property
    def feasible(self) -> bool:
        return self.fault is None


def compare(
    problem: PlacementProblem, placement: Placement, own: IntArray | None = None
) -> tuple[Compared, ...]:
    """Our placement beside others; METIS' only where ``pymetis`` is installed.

    Args:
        own: the user's device of each node, as of :func:`read_assignment`.
    """
    found = {
        "Forescale": placement.device_N,
        "even split": even_split(problem),
        "greedy (accelerate)": greedy_fill(problem),
        "PipeDream": pipedream(problem),
    }
    if find_spec("pymetis") is not None:
        found["METIS"] = metis(problem)
    if own is not None:
        found["your own"] = own
    return tuple(_compared(problem, name, device_N, placement) for name, device_N in found.items())


def _compared(problem: PlacementProblem, name: str, device_N: IntArray, ours: Placement) -> Compared:
    fault = find_fault(problem, device_N)
    if ours.start_N is None:
        objective = float(loads(problem, device_N).max())
    else:
        objective = scheduled_as(problem, device_N, lower_bound=0.0).objective
    if not np.isfinite(objective):
        return Compared(name=name, objective=None, ratio=None, fault=fault)
    ratio = objective / ours.objective if ours.objective else None
    return Compared(name=name, objective=objective, ratio=ratio, fault=fault)


def find_fault(problem: PlacementProblem, device_N: IntArray) -> str | None:
    """Why an assignment cannot be used, as a clause; None if it can."""
    work_N = problem.work_KN[problem.kind_D[device_N], np.arange(len(device_N))]
    if np.isinf(work_N).any():
        node = int(np.isinf(work_N).argmax())
        return f"{problem.devices[device_N[node]]} cannot run node {problem.nodes[node]}"
    for group in problem.together:
        if len(set(device_N[list(group)].tolist())) > 1:
            return f"node {problem.nodes[group[0]]} and others that belong with it are apart"
    capacity_D = np.array([problem.kinds[kind].memory_bytes for kind in problem.kind_D])
    over_D = memory_bytes(problem, device_N) - capacity_D
    if over_D.max() > 0:
        return f"{problem.devices[int(over_D.argmax())]} is short of {over_D.max():,.0f} bytes"
    return None


def read_assignment(problem: PlacementProblem, text: str) -> IntArray:
    """The device of each node from JSON: node to device name, or what ``forescale plan --json`` prints.

    Raises:
        InvalidInput: not that, or nodes or devices that do not match the graph's.
    """
    try:
        content: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"the assignment is not JSON: {error}") from error
    if isinstance(content, Mapping):
        content = content.get("assignment", content)
    if not isinstance(content, Mapping):
        raise InvalidInput("the assignment is not a JSON object of nodes and their devices")
    number = {name: position for position, name in enumerate(problem.devices)}
    for node in problem.nodes:
        if node not in content:
            raise InvalidInput(f"the assignment has no device for node {node}")
        if str(content[node]) not in number:
            raise InvalidInput(
                f"the assignment puts node {node} on {content[node]!r}; there are {', '.join(number)}"
            )
    if strangers := content.keys() - set(problem.nodes):
        raise InvalidInput(f"the assignment names node {min(strangers)}, which the graph has not")
    return np.array([number[str(content[node])] for node in problem.nodes])


def even_split(problem: PlacementProblem) -> IntArray:
    """As many nodes on each device, along a topological order."""
    parts, order = _line(problem)
    devices = _fastest(problem)
    size_B = np.bincount(parts.part_N)[order]
    before_B = np.cumsum(size_B) - size_B
    return _spread(problem, parts, order, before_B * len(devices) // len(problem.nodes))


def greedy_fill(problem: PlacementProblem) -> IntArray:
    """One device after the other filled with bytes, as Hugging Face accelerate's ``device_map="auto"``.

    Each but the last may hold an equal part of all bytes and a margin (``get_balanced_memory``); what fits
    none of them goes to the first device of another kind (``infer_auto_device_map``).
    """
    parts, order = _line(problem)
    devices = _fastest(problem)
    all_bytes = float(problem.memory_bytes_N.sum())
    grouped = [float(problem.memory_bytes_N[list(group)].sum()) for group in problem.together]
    margin_bytes = 1.25 * max([all_bytes / len(problem.nodes), *grouped])
    capacity = problem.kinds[int(problem.kind_D[devices[0]])].memory_bytes
    budgets = [min(all_bytes / len(devices) + margin_bytes, capacity)] * (len(devices) - 1)
    budgets += [capacity, np.inf]
    chosen: list[int] = []
    device, held_bytes = 0, 0.0
    for block in order:
        size_bytes = float(parts.memory_bytes_A[block])
        while held_bytes + size_bytes > budgets[device]:
            device, held_bytes = device + 1, 0.0
        held_bytes += size_bytes
        chosen.append(device)
    return _spread(problem, parts, order, np.array(chosen))


def pipedream(problem: PlacementProblem) -> IntArray:
    """PipeDream's dynamic programme without replicas (Narayanan et al., SOSP 2019, §3.1).

    One line of nodes is cut so that neither a stage's work nor what crosses a cut takes long; a tensor
    counts once per reader on its other side.
    """
    parts, order = _line(problem)
    work_B = parts.work_KA[_fastest_kind(problem), order]
    ends_j = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(work_B), work_B, 0.0))])
    crossing_j = _crossing(problem, parts, order)
    best_j = ends_j
    cuts: list[IntArray] = []
    for _ in range(len(_fastest(problem)) - 1):
        stage_ij = np.where(np.tri(len(ends_j), dtype=bool).T, ends_j[None, :] - ends_j[:, None], np.inf)
        reached_ij = np.maximum(stage_ij, np.maximum(best_j, crossing_j)[:, None])
        cut_j = reached_ij.argmin(axis=0)
        shorter_j = reached_ij[cut_j, np.arange(len(cut_j))]
        cuts.append(np.where(shorter_j < best_j, cut_j, -1))  # a device may stay idle
        best_j = np.minimum(shorter_j, best_j)
    bounds = [len(order)]
    for cut_j in reversed(cuts):
        if (cut := int(cut_j[bounds[-1]])) >= 0:
            bounds.append(cut)
    bounds = [0, *reversed(bounds)]
    lengths = [end - start for start, end in pairwise(bounds)]
    return _spread(problem, parts, order, np.repeat(np.arange(len(lengths)), lengths))


def metis(problem: PlacementProblem) -> IntArray:
    """METIS' partition of the graph: equal work, few tensors cut (Karypis and Kumar, 1998).

    Raises:
        InvalidInput: ``pymetis`` is not installed.
    """
    if find_spec("pymetis") is None:
        raise InvalidInput("METIS' partition needs pymetis: pip install 'forescale[plan]'")
    import pymetis  # noqa: PLC0415 - of an extra

    parts = merge(problem, atoms(problem))
    count = len(_fastest(problem))
    work_A = parts.work_KA[_fastest_kind(problem)]
    work_A = np.where(np.isfinite(work_A), work_A, 0.0)
    weight: list[dict[int, float]] = [{} for _ in range(parts.count)]
    for net in problem.nets:
        source, *readers = parts.part_N[list(net.nodes)].tolist()
        for reader in set(readers) - {source}:
            for a, b in ((source, reader), (reader, source)):
                weight[a][b] = weight[a].get(b, 0.0) + net.cost
    cost_E = np.array([cost for known in weight for cost in known.values()])
    found = pymetis.part_graph(
        count,
        pymetis.CSRAdjacency(
            np.cumsum([0, *(len(known) for known in weight)]).tolist(),
            [other for known in weight for other in known],
        ),
        vweights=_whole(work_A),
        eweights=_whole(cost_E),
        options=pymetis.Options(seed=0),
    )
    return _spread(problem, parts, list(range(parts.count)), np.array(found.vertex_part))


def _whole(value_X: Array) -> list[int]:
    """Weights as METIS takes them, at least 1."""
    return np.maximum(np.rint(value_X * (_METIS_WEIGHT / (value_X.sum() or 1.0))), 1).astype(int).tolist()


def _fastest_kind(problem: PlacementProblem) -> int:
    """The kind of device with the least work for the nodes that it can run."""
    finite_KN = np.isfinite(problem.work_KN)
    mean_K = [
        float(work_N[finite_N].mean()) if kind.count and finite_N.any() else np.inf
        for kind, work_N, finite_N in zip(problem.kinds, problem.work_KN, finite_KN, strict=True)
    ]
    return int(np.argmin(mean_K))


def _fastest(problem: PlacementProblem) -> list[int]:
    """Devices of that kind: what these planners plan for is devices that are alike."""
    return np.flatnonzero(problem.kind_D == _fastest_kind(problem)).tolist()


def _line(problem: PlacementProblem) -> tuple[Parts, list[int]]:
    """Blocks in a topological order of the forward pass; the backward pass goes with it."""
    block_N, _ = blocks(problem, atoms(problem))
    order = order_of(int(block_N.max()) + 1, forward_edges(problem, block_N), problem.nodes)
    return merge(problem, block_N), order


def _crossing(problem: PlacementProblem, parts: Parts, order: Sequence[int]) -> Array:
    """Cost of all edges across each boundary of the line."""
    position_B = np.empty(parts.count, dtype=np.int64)
    position_B[order] = np.arange(parts.count)
    change_j = np.zeros(parts.count + 1)
    for net in problem.nets:
        at = position_B[parts.part_N[list(net.nodes)]]
        np.add.at(change_j, np.minimum(at[1:], at[0]) + 1, net.cost)
        np.add.at(change_j, np.maximum(at[1:], at[0]) + 1, -net.cost)
    return np.cumsum(change_j)


def _spread(problem: PlacementProblem, parts: Parts, order: Sequence[int], place_B: IntArray) -> IntArray:
    """Device of each node from the place of each part in the order; those beyond stand for any other kind."""
    devices = _fastest(problem)
    others = [device for device in range(len(problem.devices)) if device not in devices]
    device_A = np.empty(parts.count, dtype=np.int64)
    for part, place in zip(order, place_B.tolist(), strict=True):
        wanted = devices[place] if place < len(devices) else (others or devices[-1:])[0]
        able = [wanted, *others, *devices]
        device_A[part] = next(
            (d for d in able if np.isfinite(parts.work_KA[problem.kind_D[d], part])), wanted
        )
    return device_A[parts.part_N]
