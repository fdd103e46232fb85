from __future__ import annotations

from pathlib import Path

import pytest

from forescale.core.cluster import Cluster, Device, DeviceKind, Link
from forescale.core.errors import InvalidInput
from forescale.engine.train.crew import Crew, check_reachable


def cluster(*kinds: tuple[DeviceKind, int]) -> Cluster:
    devices = tuple(
        Device(name=f"{kind}-{number}", kind=kind, index=index, memory_bytes=1)
        for number, (kind, index) in enumerate(kinds)
    )
    return Cluster(devices=devices, default_link=Link(bandwidth_bytes_per_s=1.0, latency_s=0.0))


CPU, CUDA = DeviceKind.CPU, DeviceKind.CUDA


def test_cpu_and_gpu_together_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="GPUs only, or CPUs only"):
        Crew(cluster((CUDA, 0), (CPU, 0)), tmp_path)


def test_two_workers_on_one_gpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="same GPU"):
        Crew(cluster((CUDA, 1), (CUDA, 1)), tmp_path)


@pytest.mark.parametrize("kinds", [((CPU, 0), (CPU, 0)), ((CUDA, 0), (CUDA, 1))])
def test_devices_of_one_kind_can_reach_each_other(kinds: tuple[tuple[DeviceKind, int], ...]) -> None:
    check_reachable(cluster(*kinds))
