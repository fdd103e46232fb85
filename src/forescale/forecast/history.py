"""The last values of many series, in half the memory.

Axes: N = series, C = capacity in steps (a ring), X = whatever is asked for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forescale.forecast.forecaster import Array


class RecentValues:
    """A ring of values, relative to each series' first one: so large levels keep their small changes.

    Args:
        series: N.
        capacity: steps to keep.
    """

    learned = ("steps", "_next", "_origin_N", "_ring_NC")

    def __init__(self, series: int, capacity: int) -> None:
        self.steps = 0
        self._next = 0
        self._origin_N = np.zeros(series)
        self._ring_NC = np.zeros((series, capacity), dtype=np.float32)

    def append(self, values_N: Array, first_N: npt.NDArray[np.bool_]) -> None:
        """Take the next values; where ``first_N``, there was none before."""
        self._origin_N = np.where(first_N, values_N, self._origin_N)
        self._ring_NC[:, self._next] = np.clip(values_N - self._origin_N, -3e38, 3e38)
        self._next = (self._next + 1) % self._ring_NC.shape[1]
        self.steps = min(self.steps + 1, self._ring_NC.shape[1])

    def repeat(self, values_N: Array, steps: int) -> None:
        """Take the same values so many times."""
        capacity = self._ring_NC.shape[1]
        places = (self._next + np.arange(min(steps, capacity))) % capacity
        self._ring_NC[:, places] = np.clip(values_N - self._origin_N, -3e38, 3e38)[:, None]
        self._next = (self._next + steps) % capacity
        self.steps = min(self.steps + steps, capacity)

    def at(self, ago_X: npt.NDArray[np.int64]) -> Array:
        """values_NX of so many steps ago (0 = the newest); the oldest known where that is too long ago."""
        ago_X = np.minimum(ago_X, self.steps - 1)
        capacity = self._ring_NC.shape[1]
        values_NX = self._ring_NC[:, (self._next - 1 - ago_X) % capacity].astype(np.float64)
        return values_NX + self._origin_N.reshape(-1, *(1,) * ago_X.ndim)

    def at_each(self, ago_NX: npt.NDArray[np.int64]) -> Array:
        """The same for each series of its own."""
        ago_NX = np.minimum(ago_NX, self.steps - 1)
        ends_X = (1,) * (ago_NX.ndim - 1)
        rows_N = np.arange(len(ago_NX)).reshape(-1, *ends_X)
        values_NX = self._ring_NC[rows_N, (self._next - 1 - ago_NX) % self._ring_NC.shape[1]].astype(
            np.float64
        )
        return values_NX + self._origin_N.reshape(-1, *ends_X)

    def last(self, steps: int) -> Array:
        """The last min(steps, self.steps) values_NT, newest last."""
        return self.at(np.arange(min(steps, self.steps) - 1, -1, -1))
