"""Small placement problems and their answers."""

from __future__ import annotations

import numpy as np

from forescale.plan.placement.loads import loads, memory_bytes, work
from forescale.plan.placement.place import Placement
from forescale.plan.placement.problem import DeviceKind, IntArray, Net, PlacementProblem


def chain(
    work: list[float], *, cost: float = 1.0, sizes: list[float] | None = None, count: int = 2
) -> PlacementProblem:
    """Nodes one after the other for accelerators of 100 bytes and one CPU ten times as slow."""
    nodes = len(work)
    return PlacementProblem(
        nodes=tuple(f"n{number}" for number in range(nodes)),
        work_KN=np.array([work, [10 * time for time in work]]),
        memory_bytes_N=np.array(sizes or [1.0] * nodes),
        nets=tuple(Net(cost=cost, nodes=(node, node + 1)) for node in range(nodes - 1)),
        together=(),
        backward_N=np.zeros(nodes, dtype=bool),
        kinds=(
            DeviceKind(name="acc", count=count, memory_bytes=100.0, pays_transfers=True),
            DeviceKind(name="cpu", count=1, memory_bytes=np.inf, pays_transfers=False),
        ),
    )


def random_nets(rng: np.random.Generator, count: int) -> tuple[Net, ...]:
    """Tensors of some of so many nodes, each read by about half of the later ones; dearer far away."""
    nets: list[Net] = []
    for source in range(count - 1):
        if (read := source + 1 + np.flatnonzero(rng.random(count - source - 1) < 0.5)).size:
            near = float(rng.integers(0, 10))
            far_costs = (near + float(rng.integers(0, 10)),)
            nets.append(Net(cost=near, nodes=(source, *read.tolist()), far_costs=far_costs))
    return tuple(nets)


def answer(problem: PlacementProblem, device_N: IntArray | list[int]) -> Placement:
    """That assignment as a placement, with no bound."""
    device_N = np.array(device_N)
    load_D = loads(problem, device_N)
    return Placement(
        device_N=device_N,
        objective=float(load_D.max()),
        lower_bound=0.0,
        load_D=load_D,
        work_D=work(problem, device_N),
        memory_bytes_D=memory_bytes(problem, device_N),
    )
