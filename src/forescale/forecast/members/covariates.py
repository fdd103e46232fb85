"""Members that expect a series to stay in proportion to a covariate: twice the compute, twice the time.

A regression finds that out, too, but needs many values for it, and forgets slowly.

Axes: N = series, M = forecasts of the family, J = target, K = covariate, A = smoothing weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Moment, Targets

_WEIGHTS_A = np.array([0.3, 0.05])  # of the newest value and covariate in their means


class Proportions:
    """Smoothed value over smoothed covariate, times the covariate of the target.

    Where a covariate is unknown, or was not always positive, the present level is forecast.

    Args:
        series: N.
        targets: what is forecast.
        covariates: names of K facts.
    """

    learned = ("_value_NAK", "_told_NAK", "_count_NK", "_positive_NK", "_newest_NK")

    def __init__(self, series: int, targets: Targets, *, covariates: Sequence[str]) -> None:
        self.names = tuple(f"{name}_times_{weight:g}" for weight in _WEIGHTS_A for name in covariates)
        self._columns = len(targets.lead_steps_J)
        shape = (series, len(_WEIGHTS_A), len(covariates))
        self._value_NAK = np.zeros(shape)
        self._told_NAK = np.zeros(shape)
        self._count_NK = np.zeros((series, len(covariates)))
        self._positive_NK = np.ones((series, len(covariates)), dtype=np.bool_)
        self._newest_NK = np.full((series, len(covariates)), np.nan)

    def update(self, now: Moment) -> None:
        assert now.covariates_NK is not None
        self._newest_NK = now.covariates_NK
        self._positive_NK &= ~(self._newest_NK <= 0.0)
        known_NK = np.isfinite(now.observed_N)[:, None] & np.isfinite(self._newest_NK)
        self._count_NK += known_NK
        # The plain mean of the first values, until the smoothing's own memory is full.
        weights_NAK = np.maximum(_WEIGHTS_A[:, None], 1.0 / np.maximum(self._count_NK, 1.0)[:, None])
        weights_NAK = np.where(known_NK[:, None], weights_NAK, 0.0)
        told_NK = np.where(known_NK, self._newest_NK, 0.0)
        self._value_NAK += weights_NAK * (now.values_N[:, None, None] - self._value_NAK)
        self._told_NAK += weights_NAK * (told_NK[:, None] - self._told_NAK)

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:
        if upcoming_NJK is None:
            upcoming_NJK = np.repeat(self._newest_NK[:, None], self._columns, axis=1)
        upcoming_NAKJ = upcoming_NJK.swapaxes(1, 2)[:, None]
        usable_NAKJ = (self._positive_NK & (self._count_NK > 0))[:, None, :, None] & (upcoming_NAKJ > 0.0)
        ratio_NAK = self._value_NAK / np.where(self._told_NAK > 0.0, self._told_NAK, 1.0)
        points_NAKJ = np.where(
            usable_NAKJ, ratio_NAK[..., None] * upcoming_NAKJ, now.level_N[:, None, None, None]
        )
        return points_NAKJ.reshape(len(points_NAKJ), -1, self._columns)
