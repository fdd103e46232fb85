"""The devices of this machine: which there are, and how fast they and the links between them are."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from statistics import median
from typing import TypeVar

import torch

from forescale.core.clock import Clock, SystemClock
from forescale.core.cluster import Cluster, Device, DeviceKind, Link
from forescale.core.errors import InvalidInput
from forescale.profile.cores import allowed_cores, cpu_devices, cpu_shares, share_cores
from forescale.profile.hardware import USABLE_MEMORY
from forescale.profile.links import measure_cuda_link, measure_loopback

# What a link is taken for until it is measured.
LOOPBACK = Link(bandwidth_bytes_per_s=2e9, latency_s=50e-6, occupies_device=True)
PCIE_3_X16 = Link(bandwidth_bytes_per_s=12e9, latency_s=20e-6)

MATMUL_SIZE = 768
CUDA_MATMUL_SIZE = 4096
COPY_BYTES = 128 << 20
"""Larger than the caches of one core's share, so that a copy goes to memory."""
LEAST_RUNS, MOST_RUNS = 3, 30

Result = TypeVar("Result")
Progress = Callable[[str, float], None]
"""Called with what is measured now and the fraction done, 0 to 1."""


def _silent(what: str, fraction: float) -> None:
    del what, fraction


def find_cluster(devices: int | Sequence[str] | None = None) -> Cluster:
    """The devices of this machine, with links not measured yet.

    Args:
        devices: None for every CUDA GPU, or without GPUs the allowed cores as up to
            ``cores.DEFAULT_CPU_DEVICES`` CPU devices; a number for that many GPUs, or without GPUs that many
            CPU devices, which share the allowed cores evenly (`core_sharing` tells when too few); or
            names: ``cuda:0`` a GPU, ``cpu:0-3,6`` these cores, ``cpu`` an even share of the other cores.

    Raises:
        InvalidInput: a device that is not there, or a name that means nothing.
    """
    if isinstance(devices, str):
        devices = [devices]
    if devices is None or isinstance(devices, int):
        found = _count_devices(devices)
    else:
        found = _named_devices(devices)
    kinds = {device.kind for device in found}
    return Cluster(devices=found, default_link=LOOPBACK if kinds == {DeviceKind.CPU} else PCIE_3_X16)


def _count_devices(number: int | None) -> tuple[Device, ...]:
    if number is not None and number < 1:
        raise InvalidInput(f"{number} devices were asked for, it must be at least 1")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        if number is not None and number > gpus:
            there = "there is 1 GPU" if gpus == 1 else f"there are {gpus} GPUs"
            raise InvalidInput(
                f"{number} devices were asked for and {there}, which run one worker each; "
                "ask for fewer, or set CUDA_VISIBLE_DEVICES= to use CPU cores instead"
            )
        return tuple(_cuda_device(index) for index in range(number or gpus))
    return cpu_shares(number)


def _cuda_device(index: int) -> Device:
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise InvalidInput(f"there is no GPU cuda:{index} here")
    free_bytes, _ = torch.cuda.mem_get_info(index)
    memory_bytes = int(USABLE_MEMORY * free_bytes)
    return Device(name=f"cuda{index}", kind=DeviceKind.CUDA, index=index, memory_bytes=memory_bytes)


def parse_cores(text: str) -> tuple[int, ...]:
    """Core numbers of a list such as ``0-3,6``."""
    cores: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InvalidInput(f"{text!r} is not a list of cores; write it as 0-3,6")
        cores.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(cores))


def _named_devices(names: Sequence[str]) -> tuple[Device, ...]:
    if not names:
        raise InvalidInput("no device was named")
    gpus: list[Device] = []
    core_sets: list[tuple[int, ...] | None] = []
    for name in names:
        kind, _, which = name.partition(":")
        if kind == "cuda" and (which or "0").isdecimal():
            gpus.append(_cuda_device(int(which or 0)))
        elif kind == "cpu":
            core_sets.append(parse_cores(which) if which else None)
        else:
            raise InvalidInput(f"{name!r} is not a device; write cuda:0, cpu, or cpu:0-3")
    named = {core for cores in core_sets for core in cores or ()}
    allowed = allowed_cores()
    if strangers := sorted(named - set(allowed)):
        raise InvalidInput(f"this process may not use core {strangers[0]}; it may use {sorted(allowed)}")
    if len({gpu.index for gpu in gpus}) < len(gpus):
        raise InvalidInput("a GPU is named twice")
    unnamed = core_sets.count(None)
    others = [core for core in allowed if core not in named] or allowed
    shares = iter(share_cores(others, unnamed) if unnamed else ())
    return (*gpus, *cpu_devices([cores or next(shares) for cores in core_sets]))


def core_sharing(cluster: Cluster) -> str | None:
    """A sentence when CPU devices share cores, so that they slow each other down; else None."""
    pinned = [device for device in cluster.devices if device.cores]
    cores = {core for device in pinned for core in device.cores}
    if sum(len(device.cores) for device in pinned) == len(cores):
        return None
    return f"{len(pinned)} CPU devices share {len(cores)} cores and slow each other down"


def measure_devices(
    cluster: Cluster,
    *,
    progress: Progress = _silent,
    clock: Clock | None = None,
    budget_s: float = 2.0,
) -> Cluster:
    """The cluster with measured float32 matmul and copy rates, and measured links.

    Devices are measured one after the other, each in a thread of its own that is pinned to the device's
    cores, so this process's affinity and thread count stay what they were. The loopback link is that of
    the transport which training uses (gloo); GPU pairs are measured each.

    Args:
        budget_s: about how long it may take in total (at least some repetitions are always made).
    """
    clock = clock or SystemClock()
    per_device_s = budget_s / 2 / len(cluster.devices)
    threads = torch.get_num_threads()
    measured: list[Device] = []
    for number, device in enumerate(cluster.devices):
        progress(device.name, 0.7 * number / len(cluster.devices))
        measured.append(_in_own_thread(lambda d=device: _measured(d, clock, per_device_s)))
    torch.set_num_threads(threads)
    progress("links", 0.7)
    links = _measured_links(measured, clock)
    loopback = _measured_loopback(measured, clock, budget_s / 4)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the workers need the memory, this process no more
    progress("links", 1.0)
    default = loopback or next(iter(links.values()), cluster.default_link)
    return Cluster(devices=tuple(measured), default_link=default, links=links)


def _in_own_thread(work: Callable[[], Result]) -> Result:
    """Runs work in a new thread, which takes its affinity and thread settings with it when it ends."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            errors.append(error)

    thread = threading.Thread(target=run, name="forescale-measure")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _measured(device: Device, clock: Clock, budget_s: float) -> Device:
    where = torch.device("cpu")
    if device.kind is DeviceKind.CUDA:
        where = torch.device("cuda", device.index)
    elif device.cores:
        os.sched_setaffinity(0, device.cores)
        torch.set_num_threads(len(device.cores))
    size = MATMUL_SIZE if where.type == "cpu" else CUDA_MATMUL_SIZE
    left, right = torch.ones(size, size, device=where), torch.ones(size, size, device=where)
    source = torch.ones(COPY_BYTES // 4, device=where)
    target = torch.empty_like(source)
    matmul_s = _best_s(lambda: torch.mm(left, right), where, clock, budget_s / 2)
    copy_s = _best_s(lambda: target.copy_(source), where, clock, budget_s / 2)
    return replace(
        device, flops_per_s=2 * size**3 / matmul_s, memory_bandwidth_bytes_per_s=2 * COPY_BYTES / copy_s
    )


def _best_s(work: Callable[[], object], where: torch.device, clock: Clock, budget_s: float) -> float:
    """Shortest of several runs: the rate of the device when nothing disturbs it."""
    started = clock.monotonic_s()
    times_s: list[float] = []
    while len(times_s) < LEAST_RUNS or (
        len(times_s) < MOST_RUNS and clock.monotonic_s() - started < budget_s
    ):
        before = clock.monotonic_s()
        work()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        times_s.append(clock.monotonic_s() - before)
    return min(times_s)


def _measured_links(devices: Sequence[Device], clock: Clock) -> Mapping[tuple[str, str], Link]:
    gpus = [device for device in devices if device.kind is DeviceKind.CUDA]
    links = {
        (a.name, b.name): measure_cuda_link(
            torch.device("cuda", a.index), torch.device("cuda", b.index), clock
        )
        for a, b in combinations(gpus, 2)
    }
    cpus = [device for device in devices if device.kind is DeviceKind.CPU]
    for gpu in gpus if cpus else ():
        link = measure_cuda_link(torch.device("cpu"), torch.device("cuda", gpu.index), clock)
        links |= {(gpu.name, cpu.name): link for cpu in cpus}
    return links


def _measured_loopback(devices: Sequence[Device], clock: Clock, budget_s: float) -> Link | None:
    """The typical link between two CPU devices; None when there are no two."""
    cpus = [device for device in devices if device.kind is DeviceKind.CPU]
    if len(cpus) < 2:
        return None
    # Three pairs are enough to tell a typical one: all go through the same kernel and memory.
    pairs = list(pairwise(cpus))[:3]
    measured = [
        measure_loopback(a.cores, b.cores, clock=clock, budget_s=budget_s / len(pairs)) for a, b in pairs
    ]
    return Link(
        bandwidth_bytes_per_s=median(link.bandwidth_bytes_per_s for link in measured),
        latency_s=median(link.latency_s for link in measured),
        occupies_device=True,
    )
