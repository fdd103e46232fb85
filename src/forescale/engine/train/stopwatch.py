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
    """Seconds per activity since the last :meth:`reset`; within another activity, they count once.

    On a GPU, computing and waiting are timed by events on its stream, where both happen; handing over, which
    other streams do meanwhile, by the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(Activity, 0.0)
        self._events: list[tuple[Activity, Activity | None, torch.cuda.Event, torch.cuda.Event]] = []
        self._current: Activity | None = None

    @contextmanager
    def time(self, activity: Activity) -> Generator[None]:
        around, self._current = self._current, activity
        if self._on_gpu and activity is not Activity.TRANSFER:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._events.append((activity, around, first, last))
        else:
            start_s = time.perf_counter()
            yield
            self._count(activity, around, time.perf_counter() - start_s)
        self._current = around

    def _count(self, activity: Activity, around: Activity | None, spent_s: float) -> None:
        self._seconds[activity] += spent_s
        if around is not None:
            self._seconds[around] -= spent_s

    def reset(self) -> dict[Activity, float]:
        """Returns the seconds so far and starts again at zero."""
        for activity, around, first, last in self._events:
            last.synchronize()
            self._count(activity, around, first.elapsed_time(last) / 1e3)
        self._events.clear()
        seconds, self._seconds = self._seconds, dict.fromkeys(Activity, 0.0)
        return seconds
