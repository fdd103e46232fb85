from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from forescale.core.cluster import Cluster, Device, DeviceKind
from forescale.core.errors import InvalidInput
from forescale.profile.cgroup import read_limits
from forescale.profile.cores import allowed_cores, memory_capacity_bytes, share_cores
from forescale.profile.devices import (
    LOOPBACK,
    core_sharing,
    find_cluster,
    measure_devices,
    parse_cores,
)

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be found instead")


def test_cores_are_divided_evenly() -> None:
    assert share_cores((0, 1, 2, 3, 8), 2) == ((0, 1, 2), (3, 8))
    assert share_cores((4, 5), 2) == ((4,), (5,))


def test_too_few_cores_are_taken_in_turns_and_it_is_said() -> None:
    assert share_cores((4, 5), 3) == ((4,), (5,), (4,))
    devices = tuple(
        Device(name=f"cpu{n}", kind=DeviceKind.CPU, memory_bytes=1, cores=cores)
        for n, cores in enumerate(share_cores((4, 5), 3))
    )
    assert core_sharing(Cluster(devices=devices, default_link=LOOPBACK)) == (
        "3 CPU devices share 2 cores and slow each other down"
    )
    assert core_sharing(Cluster(devices=devices[:2], default_link=LOOPBACK)) is None


@cpu_only
def test_a_number_of_devices_shares_cores_and_memory() -> None:
    cluster = find_cluster(3)
    assert [device.name for device in cluster.devices] == ["cpu0", "cpu1", "cpu2"]
    assert {core for device in cluster.devices for core in device.cores} <= set(allowed_cores())
    assert all(device.memory_bytes == memory_capacity_bytes() // 3 for device in cluster.devices)
    assert cluster.default_link == LOOPBACK


@cpu_only
def test_without_a_request_every_allowed_core_is_used() -> None:
    cores = [core for device in find_cluster().devices for core in device.cores]
    assert sorted(cores) == list(allowed_cores())


def test_named_devices() -> None:
    core = allowed_cores()[0]
    cluster = find_cluster([f"cpu:{core}", "cpu"])
    assert cluster.devices[0].cores == (core,)
    others = tuple(c for c in allowed_cores() if c != core) or (core,)
    assert cluster.devices[1].cores == others


@pytest.mark.parametrize(
    "devices", [0, -1, [], ["tpu:0"], ["cuda:x"], ["cpu:a"], ["cpu:1-"], ["cpu:100000"], ["cuda:99"]]
)
def test_devices_that_are_not_there_are_refused(devices: object) -> None:
    with pytest.raises(InvalidInput):
        find_cluster(devices)  # type: ignore[arg-type]


def test_more_workers_than_the_memory_holds_are_not_even_started() -> None:
    with pytest.raises(InvalidInput, match=r"1000000 devices need a worker of 300 MB each.* enough for \d+$"):
        find_cluster(1_000_000)


def test_core_lists() -> None:
    assert parse_cores("0-3,6") == (0, 1, 2, 3, 6)


def test_measuring_gives_rates_and_leaves_the_process_as_it_was() -> None:
    core = allowed_cores()[0]
    cluster = find_cluster([f"cpu:{core}", f"cpu:{core}"])
    affinity, threads = os.sched_getaffinity(0), torch.get_num_threads()
    told: list[float] = []
    measured = measure_devices(cluster, progress=lambda _, fraction: told.append(fraction), budget_s=0.05)
    assert os.sched_getaffinity(0) == affinity
    assert torch.get_num_threads() == threads
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert all(device.flops_per_s > 0 for device in measured.devices)
    assert all(device.memory_bandwidth_bytes_per_s > 0 for device in measured.devices)
    assert measured.default_link.bandwidth_bytes_per_s > 0
    assert measured.default_link.latency_s > 0
    assert measured.default_link.occupies_device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus_and_their_links_are_measured() -> None:
    measured = measure_devices(find_cluster(["cuda:0", "cpu"]), budget_s=0.2)
    assert measured.devices[0].flops_per_s > measured.devices[1].flops_per_s
    assert measured.link("cuda0", "cpu0").bandwidth_bytes_per_s > 0


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_version_2_limits_apply_from_the_group_and_all_above_it(tmp_path: Path) -> None:
    write(tmp_path / "a/b/cpu.max", "max 100000\n")
    write(tmp_path / "a/cpu.max", "150000 100000\n")
    write(tmp_path / "a/b/memory.max", "1000\n")
    write(tmp_path / "a/memory.max", "max\n")
    limits = read_limits("0::/a/b\n", tmp_path)
    assert (limits.cores, limits.memory_bytes) == (1.5, 1000)


def test_version_1_limits_apply_and_a_path_of_the_host_falls_back_to_the_mount(tmp_path: Path) -> None:
    write(tmp_path / "cpu/cpu.cfs_quota_us", "50000\n")
    write(tmp_path / "cpu/cpu.cfs_period_us", "100000\n")
    write(tmp_path / "memory/job/memory.limit_in_bytes", "2048\n")
    limits = read_limits("4:memory:/job\n1:cpu,cpuacct:/docker/abc\n", tmp_path)
    assert (limits.cores, limits.memory_bytes) == (0.5, 2048)


def test_no_limit_is_none(tmp_path: Path) -> None:
    write(tmp_path / "cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu/cpu.cfs_period_us", "100000\n")
    limits = read_limits("1:cpu:/\n", tmp_path)
    assert (limits.cores, limits.memory_bytes) == (None, None)
