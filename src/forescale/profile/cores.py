"""The cores and the memory that this process may use, as devices; known without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import InvalidInput
from forescale.profile.cgroup import own_limits

DEFAULT_CPU_DEVICES = 4
"""Most CPU devices made when none are asked for: more stages than that rarely pay on one machine."""

_WORKER_BYTES = 300_000_000  # what a worker takes before any model: Python and PyTorch's libraries


def allowed_cores() -> tuple[int, ...]:
    """Core numbers this process may run on, no more than its CPU quota is worth."""
    if hasattr(os, "sched_getaffinity"):
        cores = tuple(sorted(os.sched_getaffinity(0)))
    else:
        cores = tuple(range(os.cpu_count() or 1))
    quota = own_limits().cores
    return cores if quota is None else cores[: max(1, int(quota))]


def memory_capacity_bytes() -> int:
    """Memory this process may use: the machine's, or its control group's limit if that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = own_limits().memory_bytes
    return physical if limit is None else min(physical, limit)


def share_cores(cores: Sequence[int], devices: int) -> tuple[tuple[int, ...], ...]:
    """Divides cores evenly, neighbours together; with too few cores, devices take turns at one each."""
    if devices > len(cores):
        return tuple((cores[number % len(cores)],) for number in range(devices))
    least, extra = divmod(len(cores), devices)
    sizes = [least + (number < extra) for number in range(devices)]
    starts = [sum(sizes[:number]) for number in range(devices)]
    return tuple(tuple(cores[start : start + size]) for start, size in zip(starts, sizes, strict=True))


def cpu_devices(core_sets: Sequence[tuple[int, ...]], kept_bytes: int = 0) -> tuple[Device, ...]:
    """A device for each set of cores; they share the memory but for ``kept_bytes``.

    Raises:
        InvalidInput: the memory is not enough for so many.
    """
    count = max(1, len(core_sets))
    capacity_bytes = memory_capacity_bytes() - kept_bytes
    if capacity_bytes < count * _WORKER_BYTES:
        raise InvalidInput(
            f"{count} devices need a worker of {_WORKER_BYTES / 1e6:.0f} MB each, before any model; the "
            f"memory is enough for {max(0, capacity_bytes) // _WORKER_BYTES}"
        )
    memory_bytes = capacity_bytes // count
    return tuple(
        Device(name=f"cpu{number}", kind=DeviceKind.CPU, cores=cores, memory_bytes=memory_bytes)
        for number, cores in enumerate(core_sets)
    )


def cpu_shares(number: int | None = None, kept_bytes: int = 0) -> tuple[Device, ...]:
    """The allowed cores as so many devices of like size; None: one per core, up to ``DEFAULT_CPU_DEVICES``.

    Args:
        kept_bytes: memory for others than these devices' workers.

    Raises:
        InvalidInput: the memory is not enough for so many.
    """
    cores = allowed_cores()
    return cpu_devices(share_cores(cores, number or min(len(cores), DEFAULT_CPU_DEVICES)), kept_bytes)
