"""How much memory a replica's process takes, and the model in it."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import psutil
import torch

from forescale.core.cluster import Device, DeviceKind

_CUDA_PROCESS_BYTES = 600_000_000  # what CUDA keeps for each process; the driver does not tell it the process
_MAXRSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
_LIKELY_VICTIM = "500"


class Footprint:
    """What this process takes of its device's memory; make it when everything is imported.

    Attributes:
        process_bytes: without a model, and without what processes share.
    """

    def __init__(self, device: Device) -> None:
        self._is_cuda = device.kind is DeviceKind.CUDA
        memory = psutil.Process().memory_info()
        shared_bytes = getattr(memory, "shared", 0)  # pages of libraries' files; known on Linux alone
        self.process_bytes = _CUDA_PROCESS_BYTES if self._is_cuda else memory.rss - shared_bytes
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # so that importing is not the most it ever took
        self._before_bytes = memory.rss

    def model_bytes(self) -> int:
        """The most that has come on top at any time: weights, what loading took and what batches do."""
        if self._is_cuda:
            return torch.cuda.max_memory_reserved()
        most_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT_BYTES
        return max(0, most_bytes - self._before_bytes)


def be_first_victim() -> None:
    """If memory ends nevertheless, the kernel is to end a replica, which is replaced, and nobody else."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(_LIKELY_VICTIM)
