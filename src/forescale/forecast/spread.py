"""Where a series is, and how far it strays: what makes series and times comparable.

Axes: N = series, J = target, M = forecast, A = anchor.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import SmallArray

_LEVEL = 0.1  # weight of the newest value in the local level
_SHORT, _LONG = 0.03, 0.002  # weights of the newest deviation in the spreads
_LONG_SHARE = 0.1  # of the long spread, below which the short one does not fall
_LEVEL_SHARE = 1e-3  # of the size of the values, likewise
_TINY = 1e-12


class Anchor(NamedTuple):
    """What forecasts are relative to, NJ each: that of the moment a target was forecast at."""

    level: Array
    scale: Array
    size: Array


class LocalScale:
    """Local level and scale, online.

    The scale has floors, since a normaliser that can go to nothing explodes on idle series.

    Args:
        series: N.
        depth: steps for which anchors are remembered.

    Attributes:
        level_N: smoothed value.
        size_N: mean magnitude of the values over a long time.
    """

    learned = ("level_N", "size_N", "_short_N", "_long_N", "_anchors_NRA")

    def __init__(self, series: int, depth: int) -> None:
        self.level_N = np.zeros(series)
        self.size_N = np.zeros(series)
        self._short_N = np.zeros(series)
        self._long_N = np.zeros(series)
        self._anchors_NRA = np.full((series, depth, 3), np.nan)

    def update(self, step: int, observed_N: Array, seen_N: Array, settled_N: Array) -> None:
        """Take the newest values, of which NaN changes nothing.

        ``seen_N`` counts those that are not, ``settled_N`` those since the level last moved for good.
        """
        known_N = np.isfinite(observed_N)
        values_N = np.where(known_N, observed_N, self.level_N)
        strayed_N = np.abs(values_N - self.level_N)
        self.level_N = self.level_N + np.maximum(_LEVEL, 1.0 / settled_N) * (values_N - self.level_N)
        size_weight_N = np.where(known_N, np.maximum(_LONG, 1.0 / seen_N), 0.0)
        self.size_N = self.size_N + size_weight_N * (np.abs(values_N) - self.size_N)
        # The first value strays from nothing.
        counts_N = known_N & (seen_N > 1)
        first_N = 1.0 / np.maximum(seen_N - 1.0, 1.0)
        short_N = np.where(counts_N, np.maximum(_SHORT, first_N), 0.0)
        self._short_N = self._short_N + short_N * (strayed_N - self._short_N)
        long_N = np.where(counts_N, np.maximum(_LONG, first_N), 0.0)
        self._long_N = self._long_N + long_N * (strayed_N - self._long_N)
        place = step % self._anchors_NRA.shape[1]
        self._anchors_NRA[:, place] = np.stack((self.level_N, self.scale_N, self.size_N), axis=1)

    @property
    def scale_N(self) -> Array:
        floor_N = np.maximum(_LONG_SHARE * self._long_N, _LEVEL_SHARE * self.size_N)
        return np.maximum(self._short_N, floor_N) + _TINY

    def anchor(self, step_J: npt.NDArray[np.int64]) -> Anchor:
        """Level, scale and size after these steps; NaN before the first one."""
        anchor_NJA = self._anchors_NRA[:, step_J % self._anchors_NRA.shape[1]]
        return Anchor(*np.moveaxis(anchor_NJA, -1, 0))


def root_spread(points_NMJ: SmallArray, anchor: Anchor) -> Array:
    """How far values stray from such points, in scales of the anchor: with the root of the point.

    Counts do: they are nearly Poisson. Points are relative to the anchor.
    """
    level_N1J, scale_N1J = anchor.level[:, None], anchor.scale[:, None]
    size_N1J = anchor.size[:, None] + 0.1 * scale_N1J
    magnitude_NMJ = np.abs(level_N1J + points_NMJ * scale_N1J)
    return np.sqrt((magnitude_NMJ + 0.1 * size_N1J) * size_N1J) / scale_N1J
