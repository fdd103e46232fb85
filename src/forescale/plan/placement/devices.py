"""What a cluster file means for a placement problem, whatever the format of the graph.

Axes: K = device kind.
"""

from __future__ import annotations

from forescale.core.errors import InvalidInput
from forescale.plan.cluster_file import ClusterFile, DeviceGroup
from forescale.plan.placement.problem import DeviceKind, Net

MS_PER_S = 1e3

TRAINING_STATE = 4.0
"""Memory of a trained parameter, in its own size: itself, its gradient, and the two moments of AdamW."""


def device_kinds(cluster: ClusterFile) -> tuple[DeviceKind, ...]:
    """One kind per group, with its name."""
    return tuple(
        DeviceKind(
            name=group.name,
            count=group.count,
            memory_bytes=group.memory_bytes,
            pays_transfers=group.pays_transfers,
        )
        for group in cluster.groups
    )


def unit_devices(cluster: ClusterFile) -> tuple[int, ...]:
    """How many devices are in a unit of every level but the outermost."""
    return tuple(distance.devices for distance in cluster.distances[:-1])


def tensor_of(cluster: ClusterFile, size_bytes: float, nodes: tuple[int, ...], *, gradient: bool) -> Net:
    """A tensor that travels to its readers, and whose gradient may come back; the unit is the millisecond.

    What has no size is not sent.
    """
    times = (1 + gradient) * MS_PER_S * (size_bytes > 0)
    cost, *far = (times * distance.transfer_s(size_bytes) for distance in cluster.distances)
    return Net(cost=cost, nodes=nodes, far_costs=tuple(far))


def speed_of(group: DeviceGroup) -> float:
    """Speed relative to the accelerator that a graph's times were taken on; 1 where the file says nothing.

    Raises:
        InvalidInput: a CPU without a speed: it would count as fast as the accelerator.
    """
    if group.speed_ratio is None and group.kind == "cpu":
        raise InvalidInput(
            f"this graph has times of one accelerator only; give devices.{group.name} a speed relative to it"
        )
    return group.speed_ratio or 1.0
