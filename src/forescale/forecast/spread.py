"""Where a series is, and how far it strays: what makes series and times comparable.

Axes: N = series.
"""

from __future__ import annotations

import numpy as np

from forescale.forecast.forecaster import Array

_LEVEL = 0.1  # weight of the newest value in the local level
_FAST, _SLOW, _LONG = 0.2, 0.03, 0.002  # weights of the newest deviation in the spreads
_TINY = 1e-12


class LocalScale:
    """Local level and spreads, online.

    Attributes:
        level_N: smoothed value.
        size_N: mean absolute value over a long time.

    The spreads have floors, since a normaliser that can go to nothing explodes on idle series.
    """

    learned = ("level_N", "size_N", "_fast_N", "_slow_N", "_long_N")

    def __init__(self, series: int) -> None:
        self.level_N = np.zeros(series)
        self.size_N = np.zeros(series)
        self._fast_N = np.zeros(series)
        self._slow_N = np.zeros(series)
        self._long_N = np.zeros(series)

    def update(self, observed_N: Array, seen_N: Array) -> None:
        """Take the newest values, of which NaN changes nothing; ``seen_N`` counts those that are not."""
        known_N = np.isfinite(observed_N)
        values_N = np.where(known_N, observed_N, self.level_N)
        strayed_N = np.abs(values_N - self.level_N)
        self.level_N = self.level_N + np.maximum(_LEVEL, 1.0 / seen_N) * (values_N - self.level_N)
        self.size_N = self.size_N + np.where(known_N, np.maximum(_LONG, 1.0 / seen_N), 0.0) * (
            np.abs(values_N) - self.size_N
        )
        # The first value strays from nothing.
        counts_N = known_N & (seen_N > 1)
        for weight, spread_N in ((_FAST, self._fast_N), (_SLOW, self._slow_N), (_LONG, self._long_N)):
            weight_N = np.maximum(weight, 1.0 / np.maximum(seen_N - 1.0, 1.0))
            spread_N += np.where(counts_N, weight_N, 0.0) * (strayed_N - spread_N)

    @property
    def scale_N(self) -> Array:
        return np.maximum(np.maximum(self._slow_N, 0.1 * self._long_N), 1e-3 * self.size_N) + _TINY

    @property
    def fast_N(self) -> Array:
        return np.maximum(self._fast_N, 0.3 * self.scale_N)
