"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from enum import StrEnum

import torch


class Activity(StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    TRANSFER = "transfer"
    WAIT = "wait"


class Stopwatch:
    """Seconds per activity since the last :meth:`reset`.

    On a GPU, computing and waiting are timed by events on its stream, where both happen; handing over, which
    other streams do meanwhile, by the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(Activity, 0.0)
        self._events: list[tuple[Activity, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def time(self, activity: Activity) -> Generator[None]:
        if self._on_gpu and activity is not Activity.TRANSFER:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._events.append((activity, first, last))
        else:
            start_s = time.perf_counter()
            yield
            self._seconds[activity] += time.perf_counter() - start_s

    def reset(self) -> dict[Activity, float]:
        """Returns the seconds so far and starts again at zero."""
        for activity, first, last in self._events:
            last.synchronize()
            self._seconds[activity] += first.elapsed_time(last) / 1e3
        self._events.clear()
        seconds, self._seconds = self._seconds, dict.fromkeys(Activity, 0.0)
        return seconds
