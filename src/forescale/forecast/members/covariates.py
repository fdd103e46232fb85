"""Members that expect a series to stay in proportion to a covariate: twice the compute, twice the time.

A regression finds that out, too, but needs many values for it, and forgets slowly.

Axes: N = series, M = K = covariate, J = target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Moment, Targets

_WEIGHT = 0.1  # of the newest value and covariate in their means


class Proportions:
    """Smoothed value over smoothed covariate, times the covariate of the target: one forecast per covariate.

    Where a covariate is unknown, or was not always positive, the present level is forecast.

    Args:
        series: N.
        targets: what is forecast.
        covariates: names of K facts.
    """

    learned = ("_value_NK", "_told_NK", "_count_NK", "_positive_NK", "_newest_NK")

    def __init__(self, series: int, targets: Targets, *, covariates: Sequence[str]) -> None:
        self.names = tuple(f"proportional_to_{name}" for name in covariates)
        self._columns = len(targets.lead_steps_J)
        shape = (series, len(covariates))
        self._value_NK = np.zeros(shape)
        self._told_NK = np.zeros(shape)
        self._count_NK = np.zeros(shape)
        self._positive_NK = np.ones(shape, dtype=np.bool_)
        self._newest_NK = np.full(shape, np.nan)

    def update(self, now: Moment) -> None:
        assert now.covariates_NK is not None
        self._newest_NK = now.covariates_NK
        self._positive_NK &= ~(self._newest_NK <= 0.0)
        known_NK = np.isfinite(now.observed_N)[:, None] & np.isfinite(self._newest_NK)
        self._count_NK += known_NK
        # The plain mean of the first values, until the smoothing's own memory is full.
        weight_NK = np.where(known_NK, np.maximum(_WEIGHT, 1.0 / np.maximum(self._count_NK, 1.0)), 0.0)
        self._value_NK += weight_NK * (now.values_N[:, None] - self._value_NK)
        self._told_NK += weight_NK * (np.where(known_NK, self._newest_NK, 0.0) - self._told_NK)

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:
        if upcoming_NJK is None:
            upcoming_NJK = np.repeat(self._newest_NK[:, None], self._columns, axis=1)
        upcoming_NMJ = upcoming_NJK.swapaxes(1, 2)
        usable_NMJ = (self._positive_NK & (self._count_NK > 0))[..., None] & (upcoming_NMJ > 0.0)
        ratio_NM = self._value_NK / np.where(self._told_NK > 0.0, self._told_NK, 1.0)
        return np.where(usable_NMJ, ratio_NM[..., None] * upcoming_NMJ, now.level_N[:, None, None])
