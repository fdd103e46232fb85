"""Devices, links and clusters: what there is to run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class DeviceKind(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One place that runs stages: a set of CPU cores, or one accelerator.

    Attributes:
        name: unique in its cluster, e.g. ``cpu0`` or ``cuda1``.
        cores: CPU core numbers its process is pinned to (empty: not pinned).
        index: accelerator ordinal; 0 for CPUs.
        memory_bytes: capacity available to one stage.
        speed: relative to its kind's nominal speed; 0.4 takes 2.5 times as long.
        flops_per_s: measured float32 matmul rate, 0 when not measured.
        memory_bandwidth_bytes_per_s: measured copy rate (read + write), 0 when not measured.
        delay_s: how long a message that has come waits, on average, for a device that others use, too.
    """

    name: str
    kind: DeviceKind
    memory_bytes: int
    cores: tuple[int, ...] = ()
    index: int = 0
    speed: float = 1.0
    flops_per_s: float = 0.0
    memory_bandwidth_bytes_per_s: float = 0.0
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How tensors travel between two devices.

    Attributes:
        bandwidth_bytes_per_s: sustained rate of one large message.
        latency_s: time of an empty message.
        occupies_device: whether a transfer takes compute time from both ends (loopback between
            CPU processes: the copy runs on the same cores) instead of overlapping with it.
    """

    bandwidth_bytes_per_s: float
    latency_s: float
    occupies_device: bool = False

    def transfer_s(self, size_bytes: float) -> float:
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Devices and the links between them; pairs not in ``links`` use ``default_link``."""

    devices: tuple[Device, ...]
    default_link: Link
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)

    def device(self, name: str) -> Device:
        for device in self.devices:
            if device.name == name:
                return device
        raise KeyError(name)

    def link(self, source: str, target: str) -> Link:
        return self.links.get((source, target)) or self.links.get((target, source)) or self.default_link
