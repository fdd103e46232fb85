"""What would help most: the same graph planned for devices and links that are a little better.

Axes: N = node, D = device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from forescale.core.errors import InfeasiblePlan
from forescale.plan.placement.atoms import atoms, merge
from forescale.plan.placement.bounds import best_bound
from forescale.plan.placement.loads import loads
from forescale.plan.placement.place import Placement, place
from forescale.plan.placement.problem import DeviceKind, IntArray, Net, PlacementProblem

_LINK = 2.0
_MORE = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Improvement:
    """A change of the devices or of what is between them.

    Attributes:
        change: what is changed, as a clause ("one more acc").
        objective: the longest load of a placement found for it, at most that of the placement there is.
        gain: by which fraction of the present longest load that is shorter.
        most: no placement gains more than this fraction.
    """

    change: str
    objective: float
    gain: float
    most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """The device with the longest load: ``work`` and ``transfers`` add up to it.

    Attributes:
        memory_fraction: how much of its memory is full; 0 if that has no limit.
    """

    device: str
    work: float
    transfers: float
    memory_fraction: float


def bottleneck(problem: PlacementProblem, placement: Placement) -> Bottleneck:
    """The device that sets the pace."""
    device = int(placement.load_D.argmax())
    held_bytes = float(placement.memory_bytes_D[device])
    capacity_bytes = problem.kinds[int(problem.kind_D[device])].memory_bytes
    return Bottleneck(
        device=problem.devices[device],
        work=float(placement.work_D[device]),
        transfers=float(placement.load_D[device] - placement.work_D[device]),
        memory_fraction=held_bytes / capacity_bytes if capacity_bytes else 0.0,
    )


def what_would_help(problem: PlacementProblem, placement: Placement) -> tuple[Improvement, ...]:
    """Changes with what they gain, the greatest gain first.

    Each is planned anew in intervals of the forward pass, which is quick, and the present placement is kept
    where that is no shorter. A free placement may therefore gain more, up to ``most``.
    """
    found = [
        _improvement(change, changed, device_N, placement.objective)
        for change, changed, device_N in _changes(problem, placement.device_N)
    ]
    return tuple(sorted(found, key=lambda improvement: (-improvement.gain, -improvement.most)))


def _changes(
    problem: PlacementProblem, device_N: IntArray
) -> Iterator[tuple[str, PlacementProblem, IntArray]]:
    """What is changed, the problem then, and the present placement in it."""
    pays = any(kind.count and kind.pays_transfers for kind in problem.kinds)
    if pays and any(max((net.cost, *net.far_costs)) for net in problem.nets):
        nets = tuple(
            Net(
                cost=net.cost / _LINK,
                nodes=net.nodes,
                far_costs=tuple(cost / _LINK for cost in net.far_costs),
            )
            for net in problem.nets
        )
        yield f"links {_LINK:g} times as fast", replace(problem, nets=nets), device_N
    for number, kind in enumerate(problem.kinds):
        if not kind.count:
            continue
        one_more = _with_kind(problem, number, replace(kind, count=kind.count + 1))
        yield f"one more {kind.name}", one_more, device_N + (problem.kind_D[device_N] > number)
        if np.isfinite(kind.memory_bytes) and problem.memory_bytes_N.any():
            roomier = replace(kind, memory_bytes=_MORE * kind.memory_bytes)
            yield (
                f"{_MORE - 1:.0%} more memory on {kind.name}",
                _with_kind(problem, number, roomier),
                device_N,
            )
        work_KN = problem.work_KN.copy()
        work_KN[number] /= _MORE
        yield f"{kind.name} {_MORE - 1:.0%} faster", replace(problem, work_KN=work_KN), device_N


def _with_kind(problem: PlacementProblem, number: int, kind: DeviceKind) -> PlacementProblem:
    return replace(problem, kinds=(*problem.kinds[:number], kind, *problem.kinds[number + 1 :]))


def _improvement(change: str, problem: PlacementProblem, device_N: IntArray, present: float) -> Improvement:
    objective = float(loads(problem, device_N).max())
    bound = best_bound(problem, merge(problem, atoms(problem)), objective)
    if bound < objective:
        objective = min(objective, _planned(problem))
    return Improvement(
        change=change,
        objective=objective,
        gain=1 - objective / present if present else 0.0,
        most=max(1 - bound / present, 0.0) if present else 0.0,
    )


def _planned(problem: PlacementProblem) -> float:
    try:
        return place(problem, contiguous=True).objective
    except InfeasiblePlan:  # in intervals; a free placement that fits is there already
        return np.inf
