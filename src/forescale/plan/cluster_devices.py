"""The devices of a cluster file, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from forescale.core.cluster import Cluster, Device, DeviceKind, Link
from forescale.core.errors import InvalidInput
from forescale.plan.cluster_file import ClusterFile, DeviceGroup, Distance
from forescale.profile.rated import Rates


def devices_of(file: ClusterFile) -> Cluster:
    """The devices in the file's order, with the links between them.

    A tensor travels at the rate of the slowest link it passes, beside the computation. Devices that do not
    pay for transfers are as far from each other one as the outermost level that is needed.
    """
    devices: list[Device] = []
    inside: list[str] = []
    for group in file.groups:
        kind = DeviceKind.CPU if group.kind == "cpu" else DeviceKind.CUDA
        names = [f"{group.name}{number}" for number in range(group.count)]
        devices += [Device(name=n, kind=kind, memory_bytes=int(group.memory_bytes)) for n in names]
        inside += names if group.pays_transfers else []
    *near, far = file.distances
    links: dict[tuple[str, str], Link] = {}
    for distance in reversed(near):
        for unit in range(0, len(inside), distance.devices):
            members = inside[unit : unit + distance.devices]
            links.update(dict.fromkeys(combinations(members, 2), _link(distance)))
    return Cluster(devices=tuple(devices), default_link=_link(far), links=links)


def rates_of(file: ClusterFile) -> Mapping[str, Rates]:
    """What each device sustains, by its name.

    Raises:
        InvalidInput: the file does not say it of a group.
    """
    return {f"{group.name}{number}": _rates(group) for group in file.groups for number in range(group.count)}


def _link(distance: Distance) -> Link:
    return Link(
        bandwidth_bytes_per_s=min(link.bandwidth_bytes_per_s for link in distance.links),
        latency_s=max(link.latency_s for link in distance.links),
    )


def _rates(group: DeviceGroup) -> Rates:
    rate, half_rate = group.flops_per_s, group.half_flops_per_s
    bandwidth = group.memory_bandwidth_bytes_per_s
    if rate is None or half_rate is None or bandwidth is None:
        raise InvalidInput(
            f"for a model, devices.{group.name} needs a profile, or flops_per_s and "
            "memory_bandwidth_bytes_per_s"
        )
    return Rates(flops_per_s=rate, half_flops_per_s=half_rate, memory_bandwidth_bytes_per_s=bandwidth)
