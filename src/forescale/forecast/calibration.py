"""Upper quantiles that cover as often as they say, whatever the series does.

Each quantile is read at a level of its own, moved up a little after every miss and down after every hit so
that the share of misses tends to the wanted one without any assumption about the series: adaptive conformal
inference (Gibbs and Candès, "Adaptive conformal inference under distribution shift", NeurIPS 2021), as
quantile tracking (Angelopoulos, Candès and Tibshirani, "Conformal PID control for time series prediction",
NeurIPS 2023). Levels are moved in normal scores, in which the tail goes on beyond the highest level.

Axes: N = series, J = target, L = level.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import SmallArray, Targets

_RATE = 0.01  # normal scores per miss of a median, one step ahead
_UPPER = 0.95  # lower levels are not moved: errors and weights alone cover well there, and moving costs
_LEAD_POWER = 0.8  # misses of longer leads come in runs as long and tell less each
_RARE, _RARE_LEAD_POWER = 0.99, 0.5  # levels from here on: so few misses that each must count
_TAIL_POWER = 0.4  # misses of higher levels are rarer and tell more each
_FARTHEST = 3.0


class AdaptiveLevels:
    """Moves the levels that quantiles are read at.

    Args:
        series: N.
        targets: J of them.
        levels_L: quantile levels, ascending.
    """

    learned = ("_moved_NJL",)

    def __init__(self, series: int, targets: Targets, levels_L: Array) -> None:
        leads_J = targets.lead_steps_J.astype(np.float64)
        self._levels_L = levels_L
        self._scores_L = scores(levels_L)
        tail_L = np.where(levels_L >= _UPPER, (1.0 - levels_L) ** -_TAIL_POWER, 0.0)
        power_L = np.where(levels_L >= _RARE, _RARE_LEAD_POWER, _LEAD_POWER)
        self._rate_JL = _RATE * tail_L * leads_J[:, None] ** -power_L
        # Few errors are known at first, so tails begin a little wider.
        wide_L = np.where(levels_L >= _UPPER, 0.002 / (1.0 - levels_L), 0.0)
        self._moved_NJL = np.broadcast_to(wide_L, (series, len(leads_J), len(levels_L))).copy()

    def learn(self, due_NJ: SmallArray, issued_NJL: SmallArray) -> None:
        """Take targets and what was issued for them; NaN where either is unknown."""
        known_NJ = np.isfinite(due_NJ) & np.isfinite(issued_NJL[..., 0])
        missed_NJL = due_NJ[..., None] > issued_NJL
        move_NJL = self._rate_JL * (missed_NJL - (1.0 - self._levels_L))
        self._moved_NJL += np.where(known_NJ[..., None], move_NJL, 0.0)
        np.clip(self._moved_NJL, -_FARTHEST, _FARTHEST, out=self._moved_NJL)

    def read(self, quantiles_NJL: Array) -> Array:
        """The quantiles at the moved levels, ascending along L."""
        if len(self._levels_L) == 1:  # no shape to read anything from
            return quantiles_NJL
        return np.sort(read_at(quantiles_NJL, self._scores_L, self._scores_L + self._moved_NJL), axis=-1)


def scores(levels_L: Array) -> Array:
    """Normal scores of levels."""
    return np.array([NormalDist().inv_cdf(float(level)) for level in levels_L])


def read_at(quantiles_XL: Array, scores_L: Array, wanted_XK: Array) -> Array:
    """Quantiles at other normal scores, on straight lines between and beyond those known."""
    above_XK = np.searchsorted(scores_L, wanted_XK).clip(1, len(scores_L) - 1)
    low_XK = np.take_along_axis(quantiles_XL, above_XK - 1, axis=-1)
    high_XK = np.take_along_axis(quantiles_XL, above_XK, axis=-1)
    share_XK = (wanted_XK - scores_L[above_XK - 1]) / (scores_L[above_XK] - scores_L[above_XK - 1])
    return low_XK + share_XK * (high_XK - low_XK)
