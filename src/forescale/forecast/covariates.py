"""Series that follow known facts: the predicted work of upcoming batches, planned events, the calendar.

`ProportionalForecaster` is for one series and one covariate that a value is in proportion to, as the busy
time of a device is to its predicted time. `CovariateRegression` is a member of banks, for any number of
covariates whose effect has to be learned.

Axes: N = series, M = forecast, J = target, K = covariate, F = feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, isnan, log

import numpy as np

from forescale.forecast.forecaster import Array, Covariates, Forecaster, ForecasterState
from forescale.forecast.members.member import Moment, Targets

_FORGETTING = 0.995  # of what was seen a step before
_RIDGE = 1.0  # observations that say a covariate has no effect
_RESIDUAL_WEIGHT = 0.1  # of the newest in the mean error, which says where the level is now
_EXTREME = 4.0  # standard deviations that a covariate may lie from its mean before it counts no more


class ProportionalForecaster:
    """A level times a covariate: what it forecasts is the value's logarithm less that of the covariate.

    Steps without the covariate, or at which it or the value is not positive, teach it nothing.

    Args:
        ratio: forecasts the logarithm, at the horizons and levels asked for.
        covariate: name of the covariate.
    """

    def __init__(self, ratio: Forecaster, covariate: str) -> None:
        self._ratio = ratio
        self._covariate = covariate

    def update(self, value: float, covariates: Covariates | None = None) -> None:
        """Take a value with the covariate of the same step."""
        size = (covariates or {}).get(self._covariate, 0.0)
        if not isnan(value) and value > 0.0 and size > 0.0:
            self._ratio.update(log(value / size))

    def predict(self, covariates: Covariates | None = None) -> Array:
        """quantiles_HL where the covariate is, at all horizons, what ``covariates`` says."""
        size = (covariates or {}).get(self._covariate, 0.0)
        return size * np.exp(np.minimum(self._ratio.predict(), 700.0))

    def state(self) -> ForecasterState:
        return self._ratio.state()

    def restore(self, state: ForecasterState) -> None:
        self._ratio.restore(state)


class CovariateRegression:
    """Says what known facts say: a ridge regression of the value on them, and one of its logarithm.

    Both forget exponentially (recursive least squares; Ljung, "System Identification", 1999, ch. 11), and
    are moved to where the values are now by a running mean of their errors. The second one, in which
    covariates multiply, is the first one again for series that are not positive. A planned event is a
    covariate that is 1 while it lasts. Of covariates that are not known ahead, the newest are taken.

    Args:
        series: N.
        targets: what is forecast; of a peak, the value at its end is said.
        covariates: K.
    """

    names = ("covariates_sum", "covariates_product")
    learned = (
        "_weight", "_mean_NK", "_square_NK", "_product_NFF", "_moment_NMF", "_slope_NMF",
        "_residual_NM", "_positive_N",
    )  # fmt: skip

    def __init__(self, series: int, targets: Targets, *, covariates: int) -> None:
        features = covariates + 1
        self._targets = len(targets.lead_steps_J)
        self._weight = 0.0
        self._mean_NK = np.zeros((series, covariates))
        self._square_NK = np.zeros((series, covariates))
        self._product_NFF = np.zeros((series, features, features))
        self._moment_NMF = np.zeros((series, len(self.names), features))
        self._slope_NMF = np.zeros((series, len(self.names), features))
        self._residual_NM = np.zeros((series, len(self.names)))
        self._positive_N = np.ones(series, dtype=bool)

    def update(self, now: Moment) -> None:
        """Learn from the newest values and the covariates of the same step."""
