"""How much memory a replica's process takes, and the models in it."""

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
        common_bytes: what it shares with all others that were forked from the same process.
    """

    def __init__(self, device: Device) -> None:
        self._is_cuda = device.kind is DeviceKind.CUDA
        memory = psutil.Process().memory_info()
        self._own_bytes = _own_bytes()
        self._copied_bytes: int | None = None
        self.process_bytes = _CUDA_PROCESS_BYTES if self._is_cuda else self._own_bytes
        files_bytes = getattr(memory, "shared", memory.rss)  # pages of libraries' files; known on Linux alone
        self.common_bytes = 0 if self._is_cuda else max(0, memory.rss - files_bytes - self._own_bytes)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # so that importing is not the most it ever took
        self._before_bytes = memory.rss
        self._told_bytes = 0
        self._replica: str | None = None
        self._taken_bytes: dict[str, int] = {}

    def turn(self, replica: str | None) -> None:
        """What comes on top from now on is a replica's; batches take memory when they are started."""
        if replica != self._replica:
            self._settle()
            self._replica = replica

    def forget(self, replica: str) -> None:
        """It is held no more. What it took is left to those that come."""
        self.turn(None)
        self._taken_bytes.pop(replica, None)

    def model_bytes(self) -> dict[str, int]:
        """The most that has come on top at any time, by whose turn it was: weights, loading and batches."""
        self._settle()
        return dict(self._taken_bytes)

    def _settle(self) -> None:
        most_bytes = self._most_bytes()
        if self._replica is not None:
            taken_bytes = self._taken_bytes.get(self._replica, 0)
            self._taken_bytes[self._replica] = taken_bytes + most_bytes - self._told_bytes
        self._told_bytes = most_bytes

    def _most_bytes(self) -> int:
        if self._is_cuda:
            return torch.cuda.max_memory_reserved()
        most_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT_BYTES
        grown_bytes = max(0, most_bytes - self._before_bytes)
        if self._copied_bytes is None and self._replica is not None:
            # What was shared and is written to becomes its own, unseen by the measure above. Most of it does
            # when a model is loaded and first run; looking for it takes milliseconds, so it is done once.
            self._copied_bytes = max(0, _own_bytes() - self._own_bytes - grown_bytes)
        return max(self._told_bytes, grown_bytes + (self._copied_bytes or 0))


def _own_bytes() -> int:
    """What this process has to itself."""
    return psutil.Process().memory_full_info().uss


def be_first_victim() -> None:
    """If memory ends nevertheless, the kernel is to end a replica, which is replaced, and nobody else."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(_LIKELY_VICTIM)
