"""Series that follow known facts: the predicted work of upcoming batches, planned events, the calendar.

`ProportionalForecaster` is for one series and one covariate that a value is in proportion to, as the busy
time of a device is to its predicted time. `CovariateRegression` is a member of banks, for any number of
covariates whose effect has to be learned.

Axes: N = series, M = forecast, J = target, K = covariate, U = the same and the value.
"""

from __future__ import annotations

from math import isnan, log

import numpy as np
import numpy.typing as npt

from forescale.forecast.forecaster import Array, Covariates, Forecaster, ForecasterState
from forescale.forecast.members.member import Moment, Targets

Flags = npt.NDArray[np.bool_]

_SLOPE_WEIGHT = 0.005  # of the newest step in what covariates do
_MEAN_WEIGHT = 0.03  # and in the means that it is measured from: a shift of level is no effect of theirs
_RIDGE = 1.0  # observations that say a covariate has no effect
_RESIDUAL_WEIGHT = 0.1  # of the newest in the mean error, which says where the level is now
_BEYOND = 1.0  # ranges that a covariate may lie outside those seen before it counts no more


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
    """Says what known facts say: a regression of the value on them, and one of its logarithm on theirs.

    Ridge regressions that forget exponentially (Ljung, "System Identification", 1999, ch. 11), moved to where
    the values are now by a running mean of their errors. The second one, in which covariates multiply, takes
    those as they are that have not always been positive, and is the first one again for series that have
    not. A planned event is a covariate that is 1 while it lasts. Of covariates that are not known ahead, the
    newest are taken.

    Args:
        series: N.
        targets: what is forecast; of a peak, the value at its end is said.
        covariates: K.
    """

    names = ("covariates_sum", "covariates_product")
    learned = (
        "_count_N", "_newest_NK", "_positive_NK", "_positive_N", "_mean_NMU", "_covariance_NMUU",
        "_slope_NMK",
        "_residual_NM", "_low_NMK", "_high_NMK",
    )  # fmt: skip

    def __init__(self, series: int, targets: Targets, *, covariates: int) -> None:
        models = len(self.names)
        self._columns = len(targets.lead_steps_J)
        self._count_N = np.zeros(series)
        self._newest_NK = np.zeros((series, covariates))
        self._positive_NK = np.ones((series, covariates), dtype=bool)
        self._positive_N = np.ones(series, dtype=bool)
        self._mean_NMU = np.zeros((series, models, covariates + 1))
        self._covariance_NMUU = np.zeros((series, models, covariates + 1, covariates + 1))
        self._slope_NMK = np.zeros((series, models, covariates))
        self._residual_NM = np.zeros((series, models))
        self._low_NMK = np.zeros((series, models, covariates))
        self._high_NMK = np.zeros((series, models, covariates))

    def update(self, now: Moment) -> None:
        """Learn from the newest values and the covariates of the same step."""
        if now.covariates_NK is None:
            return
        known_N = np.isfinite(now.observed_N) & np.isfinite(now.covariates_NK).all(axis=1)
        self._newest_NK = np.where(known_N[:, None], now.covariates_NK, self._newest_NK)
        self._look_at_signs(now.values_N, known_N)
        seen_NMU = self._seen_NMU(self._newest_NK, now.values_N)
        self._count_N += known_N
        first_N = known_N & (self._count_N == 1)
        given_NMK = seen_NMU[..., :-1]
        self._mean_NMU[first_N] = seen_NMU[first_N]
        self._low_NMK = np.where(first_N[:, None, None], given_NMK, np.minimum(self._low_NMK, given_NMK))
        self._high_NMK = np.where(first_N[:, None, None], given_NMK, np.maximum(self._high_NMK, given_NMK))
        error_NM = seen_NMU[..., -1] - self._said_NM(given_NMK)
        self._residual_NM += np.where(known_N, _RESIDUAL_WEIGHT, 0.0)[:, None] * (
            error_NM - self._residual_NM
        )
        least_N = 1.0 / np.maximum(self._count_N, 1.0)  # means of all, until there are enough
        away_NMU = seen_NMU - self._mean_NMU
        mean_weight_N = np.where(known_N, np.maximum(_MEAN_WEIGHT, least_N), 0.0)
        self._mean_NMU += mean_weight_N[:, None, None] * away_NMU
        weight_N111 = np.where(known_N, np.maximum(_SLOPE_WEIGHT, least_N), 0.0)[:, None, None, None]
        self._covariance_NMUU += weight_N111 * away_NMU[..., None] * away_NMU[..., None, :]
        self._covariance_NMUU *= 1.0 - weight_N111
        self._solve()

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002
        """Forecasts made ``now``, in the unit of the series."""
        newest_NJK = np.repeat(self._newest_NK[:, None], self._columns, axis=1)
        upcoming_NJK = newest_NJK if upcoming_NJK is None else upcoming_NJK
        upcoming_NJK = np.where(np.isfinite(upcoming_NJK), upcoming_NJK, newest_NJK)
        points_NMJ = np.empty((len(newest_NJK), len(self.names), self._columns))
        for j in range(self._columns):
            given_NMK = self._seen_NMU(upcoming_NJK[:, j], np.ones(len(newest_NJK)))[..., :-1]
            points_NMJ[:, :, j] = self._said_NM(given_NMK) + self._residual_NM
        product_NJ = np.exp(np.clip(points_NMJ[:, 1], -700.0, 700.0))
        points_NMJ[:, 1] = np.where(self._positive_N[:, None], product_NJ, points_NMJ[:, 0])
        return points_NMJ

    def _look_at_signs(self, values_N: Array, known_N: Flags) -> None:
        """Where a covariate turns out not to be positive always, forget what its logarithm did."""
        self._positive_N &= ~known_N | (values_N > 0.0)
        turned_NK = self._positive_NK & (self._newest_NK <= 0.0) & known_N[:, None]
        for n, k in np.argwhere(turned_NK):  # at most once for each
            self._positive_NK[n, k] = False
            newest = self._newest_NK[n, k]
            self._mean_NMU[n, 1, k] = self._low_NMK[n, 1, k] = self._high_NMK[n, 1, k] = newest
            self._covariance_NMUU[n, 1, k, :] = self._covariance_NMUU[n, 1, :, k] = 0.0

    def _seen_NMU(self, covariates_NK: Array, values_N: Array) -> Array:
        """Covariates and values as each regression sees them."""
        plain_NU = np.column_stack([covariates_NK, values_N])
        by_log_NU = np.column_stack([self._positive_NK, self._positive_N]) & (plain_NU > 0.0)
        return np.stack(
            [plain_NU, np.where(by_log_NU, np.log(np.maximum(plain_NU, 1e-300)), plain_NU)], axis=1
        )

    def _said_NM(self, given_NMK: Array) -> Array:
        reach_NMK = _BEYOND * (self._high_NMK - self._low_NMK)
        given_NMK = np.clip(given_NMK, self._low_NMK - reach_NMK, self._high_NMK + reach_NMK)
        away_NMK = given_NMK - self._mean_NMU[..., :-1]
        return self._mean_NMU[..., -1] + (self._slope_NMK * away_NMK).sum(axis=2)

    def _solve(self) -> None:
        inner_NMKK = self._covariance_NMUU[..., :-1, :-1].copy()
        diagonal = np.arange(inner_NMKK.shape[2])
        strength_N11 = _RIDGE / np.maximum(self._count_N, 1.0)[:, None, None]
        inner_NMKK[..., diagonal, diagonal] *= 1.0 + strength_N11
        inner_NMKK[..., diagonal, diagonal] += 1e-150  # covariates that never changed
        outer_NMK1 = self._covariance_NMUU[..., :-1, -1:]
        self._slope_NMK = np.linalg.solve(inner_NMKK, outer_NMK1)[..., 0]
