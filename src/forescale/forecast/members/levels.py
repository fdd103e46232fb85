"""Members that expect a series to stay where it is, or to go on as it goes.

Simple exponential smoothing at several speeds (Brown 1956), last of which is the last value; Holt's
linear trend, damped (Gardner & McKenzie, "Forecasting trends in time series", Management Science, 1985);
medians of the last values.

Axes: N = series, M = forecasts of the family, J = target, A = smoothing weight.
"""

from __future__ import annotations

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Moment, Targets


class SmoothedLevels:
    """Exponentially weighted means; a weight of 1 is the last value.

    Args:
        series: N.
        targets: what is forecast.
        weights: of the newest value, in (0, 1].
    """

    learned = ("_level_NA",)

    def __init__(self, series: int, targets: Targets, *, weights: tuple[float, ...]) -> None:
        self.names = tuple("last" if weight == 1.0 else f"ewma_{weight:g}" for weight in weights)
        self._weights_A = np.asarray(weights)
        self._columns = len(targets.lead_steps_J)
        self._level_NA = np.zeros((series, len(weights)))

    def update(self, now: Moment) -> None:
        # The plain mean of the first values, until the smoothing's own memory is full.
        weights_A = np.maximum(self._weights_A, 1.0 / now.seen_N[:, None])
        self._level_NA += weights_A * (now.values_N[:, None] - self._level_NA)

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002
        return np.broadcast_to(self._level_NA[:, :, None], (*self._level_NA.shape, self._columns))


class DampedTrends:
    """Holt's linear trend, damped.

    Args:
        series: N.
        targets: what is forecast.
        weights: pairs of smoothing weights, of level and of trend.
        damping: factor of the trend per step.
    """

    learned = ("_level_NM", "_trend_NM")

    def __init__(
        self,
        series: int,
        targets: Targets,
        *,
        weights: tuple[tuple[float, float], ...] = ((0.5, 0.1), (0.15, 0.02)),
        damping: tuple[float, ...] = (0.9, 0.97),
    ) -> None:
        self.names = tuple(f"holt_{level:g}" for level, _ in weights)
        self._level_weight_M, self._trend_weight_M = np.asarray(weights).T
        self._damping_M = np.asarray(damping)
        damping_MJ = self._damping_M[:, None] ** targets.lead_steps_J
        self._reach_MJ = self._damping_M[:, None] * (1.0 - damping_MJ) / (1.0 - self._damping_M[:, None])
        self._level_NM = np.zeros((series, len(weights)))
        self._trend_NM = np.zeros((series, len(weights)))

    def update(self, now: Moment) -> None:
        expected_NM = self._level_NM + self._damping_M * self._trend_NM
        error_NM = now.values_N[:, None] - expected_NM
        self._level_NM = expected_NM + np.maximum(self._level_weight_M, 1.0 / now.seen_N[:, None]) * error_NM
        # The first error is the level itself, the second that of a level of one value.
        error_NM *= (now.seen_N > 2)[:, None]
        self._trend_NM = self._damping_M * self._trend_NM + self._trend_weight_M * error_NM

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002
        return self._level_NM[:, :, None] + self._trend_NM[:, :, None] * self._reach_MJ


class RunningMedians:
    """Medians of the last values.

    Args:
        series: N.
        targets: what is forecast.
        windows: how many values.
    """

    learned = ()

    def __init__(self, series: int, targets: Targets, *, windows: tuple[int, ...]) -> None:  # noqa: ARG002
        self.names = tuple(f"median_{window}" for window in windows)
        self._windows = windows
        self._columns = len(targets.lead_steps_J)

    def update(self, now: Moment) -> None:
        pass

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002
        medians_NM = np.stack([np.median(now.history.last(window), axis=1) for window in self._windows], axis=1)
        return np.broadcast_to(medians_NM[:, :, None], (*medians_NM.shape, self._columns))
