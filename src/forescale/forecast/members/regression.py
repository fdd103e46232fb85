"""Ridge regression of every target on smoothed levels, seasons and known facts; direct, with forgetting.

The features of an autoregression, but on several scales of time instead of lags: few and smooth (as in HAR:
Corsi, "A simple approximate long-memory model of realized volatility", J. Financial Econometrics, 2009).
Sufficient statistics are discounted sums; the ridge pulls to weights that are good to start with.

Axes: N = series, J = target, F, G = feature, K = covariate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Moment, SmallArray, Targets
from forescale.forecast.members.season import Seasons
from forescale.forecast.waiting import Waiting

_SPEEDS = np.array([1.0, 0.5, 0.2, 0.08, 0.03, 0.01])  # weights of the newest value in the levels
_FIRST = slice(1, 4)  # the levels whose mean is forecast to begin with
_CLIP = 10.0  # scales; larger features and targets are outliers
_DISCOUNT = 0.998  # of what was learned, per step
_RIDGE = 10.0  # pull towards the first weights, in observations


class RidgeRegression:
    """One forecast per target.

    With covariates, their values at the present step and at the target are features, too. What was upcoming
    is learned from what came; at forecasting it must be given, or is taken to stay as it is.

    Args:
        series: N.
        targets: what is forecast.
        seasons: whose past values are features; updated before this member.
        covariates: K.
    """

    learned = (
        "_level_NF",
        "_product_NJFG",
        "_moment_NJF",
        "_waiting",
        "_center_NK",
        "_width_NK",
        "_known_NK",
    )

    def __init__(
        self, series: int, targets: Targets, *, seasons: Sequence[Seasons] = (), covariates: int = 0
    ) -> None:
        self.names = ("ridge_covariates",) if covariates else ("ridge",)
        self._seasons = tuple(seasons)
        self._waits = len(_SPEEDS) + 1 + 2 * len(self._seasons) + covariates
        columns, features = len(targets.lead_steps_J), self._waits + covariates
        self._first_F = np.zeros(features, dtype=np.float32)
        self._first_F[_FIRST] = 1.0 / 3.0
        self._level_NF = np.zeros((series, len(_SPEEDS)))
        self._product_NJFG = np.zeros((series, columns, features, features), dtype=np.float32)
        self._moment_NJF = np.zeros((series, columns, features), dtype=np.float32)
        self._waiting = Waiting(series, targets, (self._waits,), coarse=True)  # of at most _CLIP
        self._center_NK = np.zeros((series, covariates))
        self._width_NK = np.zeros((series, covariates))
        self._known_NK = np.zeros((series, covariates))

    def update(self, now: Moment) -> None:
        facts_NK = self._facts(now)
        self._learn(now, facts_NK)
        weights_NF = np.maximum(_SPEEDS, 1.0 / now.seen_N[:, None])
        self._level_NF += weights_NF * (now.values_N[:, None] - self._level_NF)
        self._waiting.put(now.step, self._features_NJF(now, facts_NK))

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:
        waited_NJF = self._waiting.due(now.step)
        covariates = self._center_NK.shape[1]
        upcoming_NJF = waited_NJF[..., self._waits - covariates :]
        if upcoming_NJK is not None and covariates:
            upcoming_NJF = _standard(upcoming_NJK, self._center_NK[:, None], self._width_NK[:, None])
        features_NJF = np.concatenate((waited_NJF, upcoming_NJF), axis=2)
        missing_NJF = self._moment_NJF - self._product_NJFG @ self._first_F
        ridge_FG = np.float32(_RIDGE) * np.eye(features_NJF.shape[2], dtype=np.float32)
        change_NJF = np.linalg.solve(self._product_NJFG + ridge_FG, missing_NJF[..., None])[..., 0]
        points_NJ = ((self._first_F + change_NJF) * features_NJF).sum(axis=2).clip(-3.0 * _CLIP, 3.0 * _CLIP)
        return (now.level_N[:, None] + now.scale_N[:, None] * points_NJ)[:, None, :]

    def _learn(self, now: Moment, facts_NK: SmallArray) -> None:
        waited_NJF = self._waiting.due(now.step)
        known_NJ = np.isfinite(now.due_NJ) & np.isfinite(waited_NJF[..., 0])
        came_NJK = waited_NJF[..., self._waits :]  # none
        if now.came_NJK is not None and facts_NK.shape[1]:
            came_NJK = _standard(now.came_NJK, self._center_NK[:, None], self._width_NK[:, None])
        features_NJF = np.concatenate((waited_NJF, came_NJK), axis=2)
        features_NJF = np.where(known_NJ[..., None], features_NJF, np.float32(0.0))
        target_NJ = np.where(known_NJ, now.due_NJ, 0.0).clip(-_CLIP, _CLIP).astype(np.float32)
        self._product_NJFG *= np.float32(_DISCOUNT)
        self._product_NJFG += features_NJF[..., :, None] * features_NJF[..., None, :]
        self._moment_NJF *= np.float32(_DISCOUNT)
        self._moment_NJF += features_NJF * target_NJ[..., None]

    def _features_NJF(self, now: Moment, facts_NK: SmallArray) -> Array:
        level_N1, scale_N1 = now.level_N[:, None], now.scale_N[:, None]
        features_NJF = np.ones((*self._moment_NJF.shape[:2], self._waits))
        place = len(_SPEEDS)
        features_NJF[:, :, :place] = ((self._level_NF - level_N1) / scale_N1)[:, None]
        for season in self._seasons:
            features_NJF[:, :, place] = (season.mean_NJ - level_N1) / scale_N1
            features_NJF[:, :, place + 1] = (season.here_N[:, None] - level_N1) / scale_N1
            place += 2
        features_NJF[:, :, place + 1 :] = facts_NK[:, None]
        return features_NJF.clip(-_CLIP, _CLIP)

    def _facts(self, now: Moment) -> SmallArray:
        """The newest covariates, standardised by all so far; 0 where missing."""
        if now.covariates_NK is None or not self._center_NK.shape[1]:
            return self._center_NK.astype(np.float32)
        known_NK = np.isfinite(now.covariates_NK)
        self._known_NK += known_NK
        weight_NK = known_NK / np.maximum(self._known_NK, 1.0)
        strayed_NK = np.where(known_NK, now.covariates_NK - self._center_NK, 0.0)
        self._center_NK += weight_NK * strayed_NK
        self._width_NK += weight_NK * (np.abs(strayed_NK) - self._width_NK)
        return _standard(now.covariates_NK, self._center_NK, self._width_NK)


def _standard(covariates: Array, center: Array, width: Array) -> SmallArray:
    """Covariates in widths from their centre, 0 where missing."""
    strayed = np.where(np.isfinite(covariates), covariates, center) - center
    return (strayed / (width + 1e-9 * np.abs(center) + 1e-30)).clip(-_CLIP, _CLIP).astype(np.float32)
