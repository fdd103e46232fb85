"""What anyone would try first: the value of a season ago, and what autoscalers go by.

They are contenders of a backtest, not members of an ensemble: each keeps the values it has seen.

Axes: H = horizon, L = level, T = time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from forescale.forecast.forecaster import Array, Covariates

_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_ERRORS = 512  # errors that quantiles are taken of, or a season of them if that is longer


class SeasonalNaive:
    """The value a season ago (Hyndman and Athanasopoulos, "Forecasting: principles and practice", 5.2).

    Around it, the empirical quantiles of the errors this would have made of late. Missing values are taken
    as forecast: the value a season before them.

    Args:
        season_steps: length of a season; None for the last value, a season of one step.
    """

    def __init__(
        self,
        step_s: float,  # noqa: ARG002 - every forecaster is constructed alike
        horizon_steps: Sequence[int] = (1, 5, 15, 60),
        levels: Sequence[float] = _LEVELS,
        season_steps: int | None = None,
    ) -> None:
        self._horizon_steps = tuple(horizon_steps)
        self._levels = tuple(levels)
        self._season = season_steps or 1
        # Horizons longer than a season reach back several: as far back as the longest, and its errors.
        back = self._back(max(self._horizon_steps))
        self._values: deque[float] = deque(maxlen=back + max(_ERRORS, self._season))

    def update(self, value: float, covariates: Covariates | None = None) -> None:  # noqa: ARG002 - the protocol's
        if np.isnan(value):
            if not self._values:
                return
            value = self._values[-self._season] if len(self._values) >= self._season else self._values[-1]
        self._values.append(value)

    def predict(self, covariates: Covariates | None = None) -> Array:  # noqa: ARG002 - the protocol's
        if not self._values:
            return np.zeros((len(self._horizon_steps), len(self._levels)))
        values_T = np.array(self._values)
        return np.vstack([self._quantiles_L(values_T, step) for step in self._horizon_steps])

    def _back(self, steps: int) -> int:
        """Steps from a target back to the newest value of its phase that was known then."""
        return self._season * -(-steps // self._season)

    def _quantiles_L(self, values_T: Array, steps: int) -> Array:
        back = self._back(steps)
        if len(values_T) <= back:  # no season seen yet: the last value
            return np.full(len(self._levels), values_T[-1])
        errors = values_T[back:] - values_T[:-back]
        return values_T[steps - back - 1] + np.quantile(errors, self._levels, method="weibull")


class MovingWindow:
    """One figure of the values in a window, at every horizon and level: autoscalers know no uncertainty.

    Args:
        window_steps: values in the window.
        figure: what is made of them, e.g. ``np.max`` as in the stabilisation window of Kubernetes'
            HorizontalPodAutoscaler (300 s), ``np.mean`` as in Knative's stable window (60 s).
    """

    def __init__(
        self,
        window_steps: int,
        figure: Callable[[Array], float],
        horizon_steps: Sequence[int] = (1, 5, 15, 60),
        levels: Sequence[float] = _LEVELS,
    ) -> None:
        self._shape = (len(tuple(horizon_steps)), len(tuple(levels)))
        self._figure = figure
        self._values: deque[float] = deque(maxlen=window_steps)

    def update(self, value: float, covariates: Covariates | None = None) -> None:  # noqa: ARG002 - the protocol's
        if not np.isnan(value):
            self._values.append(value)

    def predict(self, covariates: Covariates | None = None) -> Array:  # noqa: ARG002 - the protocol's
        return np.full(self._shape, self._figure(np.array(self._values)) if self._values else 0.0)
