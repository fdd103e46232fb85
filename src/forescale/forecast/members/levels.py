"""Members that expect a series to stay where it is, or to go on as it goes.

Simple exponential smoothing at several speeds (Brown, "Exponential smoothing for predicting demand", 1956),
the fastest of which is the last value; Holt's linear trend, damped (Gardner and McKenzie, "Forecasting
trends in time series", Management Science, 1985).

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
        # The plain mean of the first values, until the smoothing's own memory is full; again after a shift.
        weights_NA = np.maximum(self._weights_A, 1.0 / now.seen_N[:, None])
        self._level_NA += weights_NA * (now.values_N[:, None] - self._level_NA)

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002
        return np.broadcast_to(self._level_NA[:, :, None], (*self._level_NA.shape, self._columns))


class DampedTrend:
    """Holt's linear trend, damped.

    Args:
        series: N.
        targets: what is forecast.
        level_weight, trend_weight: of the newest value in the level, and of its error in the trend.
        damping: factor of the trend per step.
    """

    names = ("holt",)
    learned = ("_level_N", "_trend_N")

    def __init__(
        self,
        series: int,
        targets: Targets,
        *,
        level_weight: float = 0.3,
        trend_weight: float = 0.05,
        damping: float = 0.95,
    ) -> None:
        self._level_weight = level_weight
        self._trend_weight = trend_weight
        self._damping = damping
        self._reach_J = damping * (1.0 - damping**targets.lead_steps_J) / (1.0 - damping)
        self._level_N = np.zeros(series)
        self._trend_N = np.zeros(series)

    def update(self, now: Moment) -> None:
        expected_N = self._level_N + self._damping * self._trend_N
        error_N = now.values_N - expected_N
        self._level_N = expected_N + np.maximum(self._level_weight, 1.0 / now.seen_N) * error_N
        # The first error is the level itself, the second that of a level of one value.
        trend_error_N = np.where(now.seen_N > 2, error_N, 0.0)
        kept_N = np.where(now.seen_N > 1, self._damping * self._trend_N, 0.0)
        self._trend_N = kept_N + self._trend_weight * trend_error_N

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002
        return (self._level_N[:, None] + self._trend_N[:, None] * self._reach_J)[:, None, :]
